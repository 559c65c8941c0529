# shellcheck shell=bash disable=SC2154 # `task` and `needs` come from the train.sh that sources this
# What the full-scale recipes share, to be sourced: a table of settings, a list of jobs, and `main`, which lists, prints
# or runs them. A recipe declares `setting`s and `job`s and has a function `make_command`, which fills the array
# `command`.
#
# A job runs in the foreground; its status is the training's. Run again it goes on from the last checkpoint; after a
# normal end its folder holds `finished`, and it is not run again. SIGTERM and Ctrl-C are passed on to the training as
# SIGTERM. Whatever cannot work is one line on stderr and status 2, before anything is started.
set -euo pipefail
((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) ||
  { echo "${0##*/}: bash $BASH_VERSION: must be 4.4 or newer; name one: bash-5 $0" >&2 && exit 2; }

PEERS=2 # models that codistil, as in the paper
RUN=${RUN:-runs}
SEED=${SEED:-1}
NODES=${NODES:-1}
LOADERS=${LOADERS:-4}
LOCK_SECONDS=${LOCK_SECONDS:-120} # a machine that failed may hold its lock on a network file system for so long

declare -A default kind chosen value # of each setting: our default, what is allowed, the user's value, the job's
declare -A codistill_only=() seen=()
settings=()
jobs=()
command=()
gpus=1 # of one model, on each machine

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

say() { echo "${0##*/}: $*" >&2; }

# judge VARIABLE VALUE KIND REMEDY: end with one line unless the value is of that kind (`count`, `whole`, `number`,
# `name`, or the words that are allowed).
judge() {
  case $3 in
    count) [[ $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || die "$1=$2: must be a whole number, 0 or more; $4" ;;
    whole) [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || die "$1=$2: must be a whole number, 1 or more; $4" ;;
    number) [[ $2 =~ ^[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$ ]] || die "$1=$2: must be a number, 0 or more; $4" ;;
    name) [[ $2 =~ ^[A-Za-z0-9_.:-]+$ ]] || die "$1=$2: must be letters, digits, dots, dashes or underscores; $4" ;;
    *) [[ " $3 " == *" $2 "* ]] || die "$1=$2: must be one of ${3// /, }; $4" ;;
  esac
}

# setting NAME DEFAULT KIND [codistill]: a value that the user can set as an environment variable, the name in
# capitals; with `codistill` it means nothing to all_reduce.
setting() {
  local variable=${1^^}
  settings+=("$1")
  default[$1]=$2
  kind[$1]=$3
  codistill_only[$1]=${4:-}
  chosen[$1]=${!variable:-$2}
  judge "$variable" "${chosen[$1]}" "$3" "leave it out for $2"
}

# job ARM POINT ABOUT [SETTING=VALUE …]: one training to compare; POINT may be empty.
job() {
  local pair name
  for pair in "${@:4}"; do
    name=${pair%%=*}
    judge "${name^^}" "${pair#*=}" "${kind[$name]}" "correct the list of points"
  done
  jobs+=("$1${2:+ $2}|$3|${*:4}")
}

# points VARIABLE "VALUE …": the points of a sweep, which the user can set as an environment variable.
points() { printf -v "$1" %s "${!1:-$2}"; }

main() {
  local key name=$*
  case $name in
    "") list ;;
    -h | --help) list && explain ;;
    all)
      dry || [[ -n ${PEER:-} ]] || no_peer
      for key in "${jobs[@]}"; do
        do_job "$key"
        [[ -z ${interrupted:-} ]] || exit 143 # this one came to its end all the same
      done
      ;;
    *)
      for key in "${jobs[@]}"; do
        if [[ ${key%%|*} == "$name" ]]; then
          do_job "$key"
          return
        fi
      done
      die "$name: no such job; run $0 without arguments to see which there are"
      ;;
  esac
}

header() { awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^# shellcheck/ { sub(/^# ?/, ""); print }' "$0"; }

list() {
  local key rest
  header
  printf '\nusage: [VARIABLE=VALUE …] %s JOB, or all; DRY_RUN=1 prints the commands, -h explains\njobs:\n' "$0"
  for key in "${jobs[@]}"; do
    rest=${key#*|}
    printf '  %-36s %s\n' "${key%%|*}" "${rest%%|*}"
  done
}

explain() {
  local name
  printf '\nvariables:\n'
  printf '  %-16s %s\n' "${needs[@]}" \
    PEER "which of the $PEERS models this job trains, 0 or 1; needed for codistill only" \
    RUN "folder for checkpoints and logs, the same at every start; now $RUN" \
    EXCHANGE "folder or bucket (s3://, gs://, az://) that both peers reach; now ${EXCHANGE:-$RUN/exchange}" \
    SEED "now $SEED" \
    NODES "machines of one model; above 1 also RENDEZVOUS=HOST:PORT, HOST being one of them; now $NODES" \
    LOADERS "data loading processes of a worker; now $LOADERS" \
    EXTRA "flags added at the end of each command; not part of the folder's name" \
    DRY_RUN "1: print the commands, one a line, and run nothing"
  printf '\nsettings (a job may set its own):\n'
  for name in "${settings[@]}"; do printf '  %-16s %s\n' "${name^^}" "${chosen[$name]}"; done
}

dry() { [[ ${DRY_RUN:-0} != 0 ]]; }

do_job() {
  local arm=${1%%[ |]*} pairs=${1##*|} name pair peer peers
  for name in "${settings[@]}"; do value[$name]=${chosen[$name]}; done
  for pair in $pairs; do value[${pair%%=*}]=${pair#*=}; done
  judge SEED "$SEED" count "leave it out for 1"
  judge NODES "$NODES" whole "leave it out for 1"
  judge LOADERS "$LOADERS" count "leave it out for 4"
  check_needs
  peers=$(peers_to_run "$arm")
  for peer in $peers; do do_peer "$arm" "$peer"; done
}

# The peers of one arm that this call is about; only when printing can that be both.
peers_to_run() {
  case $1,${PEER:-} in
    all_reduce,0 | all_reduce, | codistill,0) echo 0 ;;
    codistill,1) echo 1 ;;
    all_reduce,1) say "PEER=1: nothing to do, all_reduce trains one model, PEER=0" ;;
    codistill,) if dry; then echo 0 1; else no_peer; fi ;;
    *) no_peer ;;
  esac
}

no_peer() {
  die "PEER=${PEER:-}: must be 0 or 1, since $PEERS models codistil; start one job with PEER=0, another with PEER=1"
}

do_peer() {
  local arm=$1 peer=$2 models=1 name folder made
  name=$(job_name "$arm")
  folder=$RUN/$name/peer-$peer
  made=$RUN/$name
  if [[ $arm != all_reduce ]]; then
    models=$PEERS
    made+=" and ${EXCHANGE:-$RUN/exchange}/$name" # a new peer would learn from final snapshots of the old ones
  fi
  local told=("$arm" "$peer" "$models" "$name" "$folder")
  compose "${told[@]}"
  [[ -z ${seen[$folder]:-} ]] || return 0 # two points of a figure may be one run
  seen[$folder]=yes
  if ! dry && [[ ! -e $folder/finished ]]; then
    need_command "${command[0]}"
    need_gpus "$gpus"
    mkdir -p "$folder"
    take "$folder"
    compose "${told[@]}" # somebody else may have trained on while we waited
  fi
  if [[ -e $folder/finished ]]; then
    say "finished: $folder; remove $made to train anew"
  elif dry; then
    printf '%s\n' "$(printf '%q ' "${command[@]}")" | sed 's/ $//'
  else
    run "$folder"
    ((models == 1)) || together "$folder"
  fi
}

# compose ARM PEER MODELS NAME FOLDER: the whole `command`.
compose() {
  local extra=()
  make_command "$@"
  read -ra extra <<<"${EXTRA:-}"
  [[ ! " ${extra[*]}" =~ " --stop-"(time-hours|epoch) ]] ||
    die "EXTRA=$EXTRA: must not end a training before its last update, or it counts as finished; leave it out"
  command+=("${extra[@]}")
}

# Equal settings give equal names, so that figures that show the same run share it; what does not touch an arm is left
# out of its name.
job_name() {
  local name=$task-$1 setting
  for setting in "${settings[@]}"; do
    [[ $1 != all_reduce || -z ${codistill_only[$setting]} ]] || continue
    [[ ${value[$setting]} == "${default[$setting]}" ]] || name+=-${setting//_/-}-${value[$setting]}
  done
  echo "$name-seed-$SEED" | tr : -
}

# launch MODELS NAME MODULE PROGRAM: begin `command` with what starts the workers of one of MODELS, which share WORKERS.
launch() {
  local all=${value[workers]} workers=$((value[workers] / $1)) meet=(--standalone)
  ((all % $1 == 0)) ||
    die "WORKERS=$all: must be even, since $1 models share them; leave it out for ${default[workers]}"
  ((workers % NODES == 0)) ||
    die "NODES=$NODES: must divide the $workers workers of one model; set NODES or WORKERS so that it does"
  if ((NODES > 1)); then
    [[ ${RENDEZVOUS:-} =~ ^[^:]+:[0-9]+$ ]] ||
      die "RENDEZVOUS=${RENDEZVOUS:-}: must be HOST:PORT, since NODES is $NODES; name one machine and a port free there"
    meet=(--rdzv-backend=c10d "--rdzv-endpoint=$RENDEZVOUS" "--rdzv-id=$2" "--nnodes=$NODES")
  fi
  command=("$4")
  gpus=$((workers / NODES))
  ((workers == 1)) || command=(torchrun "${meet[@]}" "--nproc-per-node=$((workers / NODES))" -m "$3")
}

# exchange_flags PEER MODELS NAME: what makes a training one of MODELS; with one it is the baseline, which has no
# exchange but the same schedules, and reports the same measures.
exchange_flags() {
  command+=(--codistill-peers "$2" --codistill-interval "${value[interval]}")
  (($2 == 1)) || command+=(
    --codistill-peer "$1" --codistill-dir "${EXCHANGE:-$RUN/exchange}" --codistill-run-id "$3"
    --codistill-loss "${value[loss]}" --codistill-alpha "${value[alpha]}"
  )
}

# need_gpus COUNT: on this machine, where that can be known.
need_gpus() {
  local there visible
  [[ -n $(type -P nvidia-smi) ]] || return 0
  there=$(nvidia-smi -L | grep -c ^GPU || true)
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
    there=${#visible[@]}
  fi
  (($1 <= there)) || die "WORKERS=${value[workers]}: must be no more than there are GPUs, here $there for $1 workers; \
set NODES to train one model on several machines, or WORKERS"
}

# take FOLDER: only one start of a run may train there, since figures share runs; the machines of one start all may. The
# training inherits the lock: it is held for as long as any process of it lives.
take() {
  local starter=${HOSTNAME:-here}:$$ waited=0 held status
  ((NODES == 1)) || starter=$RENDEZVOUS
  [[ -n $(type -P flock) ]] || return 0
  exec {held}<>"$1/lock"
  while :; do
    status=0
    flock --nonblock "$held" || status=$?
    if ((status > 1)); then
      say "$1: cannot be locked on this file system; start no second training there"
      return
    elif ((status == 0)); then
      echo "$starter" >"$1/lock"
      ((NODES == 1)) || flock --timeout "$LOCK_SECONDS" --shared "$held"
      return
    elif ((NODES > 1)) && flock --nonblock --shared "$held"; then
      [[ $(<"$1/lock") != "$starter" ]] || return 0
      flock --unlock "$held"
    fi
    ((waited < LOCK_SECONDS)) || die "$1: $(<"$1/lock") trains there, and figures may share a run; wait for its end"
    ((++waited != 5)) || say "$1: $(<"$1/lock") trains there; waiting up to $LOCK_SECONDS seconds for its end"
    sleep 1
  done
}

# together FOLDER: say how much of a peer's training was codistillation.
together() {
  local all with
  [[ -e $1/metrics.jsonl ]] || return 0
  all=$(wc -l <"$1/metrics.jsonl")
  with=$(grep -c '"peers": [1-9]' "$1/metrics.jsonl" || true)
  say "$1: the other peer was in use at $with of $all intervals"
  ((2 * with >= all)) || say "$1: most of it was not codistillation; both peers must train at the same time"
}

need_command() { [[ -n $(type -P "$1") ]] || die "$1: no such command; activate the environment that has codistill"; }

# run FOLDER: run `command`. It has a process group of its own, so that a scheduler that signals all of ours reaches it
# once, through us.
run() {
  local status again=0 pid='' stopped=''
  trap 'stopped=yes; [[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true' TERM INT HUP
  set -m
  "${command[@]}" </dev/null &
  pid=$!
  set +m
  [[ -z $stopped ]] || kill -TERM "$pid" 2>/dev/null || true # told so before there was a pid
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break # a signal ends the wait, not the training
  done
  trap - TERM INT HUP
  if [[ -n $stopped ]]; then # the last wait may have told of the signal, though the training has ended since
    wait "$pid" 2>/dev/null || again=$?
    ((again == 127)) || status=$again
  fi
  ((status == 0)) || exit "$status"
  touch "$1/finished"
  interrupted=$stopped
}
