#!/usr/bin/env bash
# Submits one job of a recipe to Slurm as one array job, an element a peer:
#
#   DATA=… recipes/slurm/submit.sh [SBATCH OPTION …] recipes/imagenet/figure-07.sh codistill interval-1250
#
# sbatch options are written --option=value. The recipe's variables (DATA, RUN, EXCHANGE, SEED, NODES …) are taken from
# the environment, which sbatch passes on; RUN must be the same folder on all machines, EXCHANGE a folder or bucket that
# all of them reach. A peer gets NODES machines with as many GPUs each as it has workers there; torchrun starts the
# workers.
#
# The elements are free to start, stop and be requeued at different times: Slurm requeues them after preemption or a
# failed machine, the script itself GRACE seconds (180) before their time ends; each then goes on from its last
# checkpoint. scancel ends them for good. DRY_RUN=1 prints the batch script and submits nothing.
set -euo pipefail

die() {
  echo "submit.sh: $*" >&2
  exit 2
}

options=
while [[ ${1:-} == -* ]]; do
  [[ $1 != -h && $1 != --help ]] || { awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" && exit; }
  [[ $1 =~ ^--[a-z-]+(=[^[:space:]]+)?$ ]] ||
    die "$1: must be an sbatch option as --option=value, before the recipe; see -h"
  options+="#SBATCH $1"$'\n'
  shift
done
(($# >= 2)) || die "no job was named: must be a recipe and one of its jobs; see -h"
[[ -x $1 ]] || die "$1: no such recipe; name one of recipes/imagenet/figure-*.sh, recipes/wmt16/*.sh"
[[ $2 == all_reduce || $2 == codistill ]] ||
  die "$2: must be all_reduce or codistill; $1 without arguments lists its jobs"
GRACE=${GRACE:-180}
[[ $GRACE =~ ^[1-9][0-9]*$ ]] || die "GRACE=$GRACE: must be a whole number of seconds, 1 or more; leave it out for 180"

recipe=$(CDPATH="" cd -- "$(dirname "$1")" && pwd)/$(basename "$1")
name=$(basename "$1" .sh)
name=${name}-$(IFS=- && echo "${*:2}")
nodes=${NODES:-1}

# The recipe judges its variables, and says which peers are still to be trained, and on how many GPUs a machine.
elements=() gpus=1
for peer in 0 1; do
  [[ $2 == codistill || $peer == 0 ]] || continue
  line=$(DRY_RUN=1 PEER=$peer RENDEZVOUS=${RENDEZVOUS:-host:29500} "$recipe" "${@:2}")
  [[ -n $line ]] || continue
  elements+=("$peer")
  [[ ! $line =~ --nproc-per-node=([0-9]+) ]] || gpus=${BASH_REMATCH[1]}
done
((${#elements[@]})) || die "$name is finished; nothing was submitted"

script=$(
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --array=$(IFS=, && echo "${elements[*]}")
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$name-%A-%a.log
#SBATCH --signal=B:USR1@$GRACE
#SBATCH --cpus-per-task=$((gpus * (${LOADERS:-4} + 1)))
$options
set -uo pipefail
unset DRY_RUN
cd $(printf %q "$PWD") || exit
export SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK # from Slurm 22.05 on, srun does not take it from sbatch
export PEER=\$SLURM_ARRAY_TASK_ID NODES=$nodes
RENDEZVOUS=\$(scontrol show hostnames "\$SLURM_JOB_NODELIST" | head -n 1):\$((20000 + SLURM_JOB_ID % 20000))
export RENDEZVOUS

# Told that its time ends: the training gets SIGTERM from Slurm, since srun would turn one into SIGKILL.
ending=
trap 'ending=yes; scancel --signal=TERM "\$SLURM_JOB_ID.0"' USR1
srun --kill-on-bad-exit=1 $(printf '%q ' "$recipe" "${@:2}")&
step=\$!
while :; do
  status=0
  wait "\$step" || status=\$?
  kill -0 "\$step" 2>/dev/null || break # a signal ends the wait, not the step
done
if [[ \$ending ]]; then # the last wait may have told of the signal, though the step has ended since
  again=0
  wait "\$step" 2>/dev/null || again=\$?
  ((again == 127)) || status=\$again
fi
# Not finished: once more, from the last checkpoint.
if [[ \$ending && \$status != 0 ]]; then scontrol requeue "\$SLURM_JOB_ID"; fi
exit "\$status"
END
)
if [[ ${DRY_RUN:-0} != 0 ]]; then
  echo "$script"
else
  [[ -n $(type -P sbatch) ]] || die "sbatch: no such command; submit from a machine of the cluster, or set DRY_RUN=1"
  sbatch <<<"$script"
fi
