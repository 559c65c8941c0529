# shellcheck shell=bash
# Makes the command of one translation training: stock fairseq-train with codistill's criterion; sourced by the figures.
here=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=recipes/common.sh
source "$here/../common.sh"

task=${task:-wmt16}
judge task "$task" "wmt16 iwslt14" "unset it"
# shellcheck source=recipes/wmt16/settings.sh
source "$here/settings.sh"
needs=(DATA "binarised data set, made by prepare.sh $task; now ${DATA:-not set}")

user_dir=

check_needs() {
  [[ -n ${DATA:-} ]] ||
    die "DATA is not set: must be a binarised data set; make one with ${here#"$PWD"/}/prepare.sh $task"
  need_command codistill
  [[ -n $user_dir ]] || user_dir=$(codistill user-dir fairseq)
  dry && return
  local language
  for language in $languages; do
    [[ -f $DATA/dict.$language.txt ]] ||
      die "DATA=$DATA: has no dict.$language.txt; make the data set with ${here#"$PWD"/}/prepare.sh $task"
  done
}

# make_command ARM PEER MODELS NAME FOLDER. fairseq itself goes on from the last checkpoint in its save dir.
make_command() {
  launch "$3" "$4" fairseq_cli.train fairseq-train
  command+=("$DATA" --user-dir "$user_dir")
  command+=(--task translation --source-lang "${languages% *}" --target-lang "${languages#* }")
  command+=(--save-dir "$5" --distributed-world-size $((value[workers] / $3)))
  # fairseq peers must start apart; timm's shift their seeds themselves.
  command+=(--seed $((SEED + 1000 * $2)) --num-workers "$LOADERS")
  model_flags
  command+=(--max-tokens "${value[tokens]}" --update-freq "${value[update_freq]}" --max-update "${value[updates]}")
  # Not at the ends of epochs too, of which one model on all workers has twice as many.
  command+=(--validate-interval-updates 1000 --validate-interval 1000000)
  command+=(--save-interval-updates 1000 --keep-interval-updates 1 --no-epoch-checkpoints)
  command+=(--best-checkpoint-metric nll_loss --log-format json --log-interval 100 --log-file "$5/train.log")
  command+=(--criterion codistill --label-smoothing "${value[label_smoothing]}")
  exchange_flags "$2" "$3" "$4"
  (($3 == 1)) || command+=(
    --codistill-alpha-growth "${value[growth]}" --codistill-alpha-every "${value[alpha_every]}"
    --codistill-label-smoothing "0:${value[reduced_smoothing]}"
  )
}

model_flags() {
  command+=(--arch "${value[arch]}" --dropout "${value[dropout]}" --weight-decay "${value[weight_decay]}")
  [[ $task != wmt16 ]] || command+=(--share-all-embeddings)
  [[ $task != iwslt14 ]] || command+=(--share-decoder-input-output-embed)
  command+=(--optimizer adam --adam-betas "(0.9, 0.98)" --clip-norm 0.0 --lr "${value[lr]}" --lr-scheduler inverse_sqrt)
  command+=(--warmup-updates "${value[warmup]}" --warmup-init-lr 1e-07 --stop-min-lr 1e-09)
  [[ ${value[precision]} != float16 ]] || command+=(--fp16)
}
