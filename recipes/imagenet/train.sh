# shellcheck shell=bash
# Makes the command of one ImageNet training: upstream timm's train.py through codistill; sourced by the figures.
here=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=recipes/common.sh
source "$here/../common.sh"
# shellcheck source=recipes/imagenet/settings.sh
source "$here/settings.sh"

task=imagenet
needs=(
  DATA "ImageNet as a folder of images with train/ and val/ (check-data.sh checks it); now ${DATA:-not set}"
  TIMM_TRAIN_SCRIPT "train.py of timm 1.0.27 to 1.0.31; now ${TIMM_TRAIN_SCRIPT:-not set}"
)

check_needs() {
  [[ -n ${DATA:-} ]] ||
    die "DATA is not set: must be the folder that holds ImageNet's train/ and val/; set DATA=/data/imagenet"
  [[ -n ${TIMM_TRAIN_SCRIPT:-} ]] ||
    die "TIMM_TRAIN_SCRIPT is not set: must be timm's train.py; get it with: curl -fLO \
https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.28/train.py"
  dry && return
  [[ -d $DATA/train ]] || die "DATA=$DATA: has no train/; see ${here#"$PWD"/}/check-data.sh for what must be there"
  [[ -d $DATA/validation || -d $DATA/val ]] || # timm would validate on the images it trains on
    die "DATA=$DATA: has no val/; see ${here#"$PWD"/}/check-data.sh for what must be there"
  [[ -f $TIMM_TRAIN_SCRIPT ]] || die "TIMM_TRAIN_SCRIPT=$TIMM_TRAIN_SCRIPT: no such file; name timm's train.py"
}

# make_command ARM PEER MODELS NAME FOLDER
make_command() {
  launch "$3" "$4" timm_codistill timm-codistill
  command+=("$TIMM_TRAIN_SCRIPT")
  # train.py takes whole epochs of warm-up from the command line, but any number from a file.
  if [[ $(per_model $((warmup * value[part])) "$3") == *.5 ]]; then
    ((value[part] == 1)) || die "PART=${value[part]}: must be 1 or even, so that halved epochs are whole; correct PARTS"
    command+=(-c "$here/half-warmup.yaml")
  else
    command+=(--warmup-epochs "$(per_model $((warmup * value[part])) "$3")")
  fi
  command+=(--data-dir "$DATA" --output "${5%/*}" --experiment "${5##*/}" --checkpoint-hist 1 --workers "$LOADERS")
  command+=(--model "${value[model]}" --batch-size "${value[batch]}" --seed "$SEED")
  optimiser_flags "$3"
  augmentation_flags
  case ${value[precision]} in
    float16) command+=(--amp) ;;
    bfloat16) command+=(--amp --amp-dtype bfloat16) ;;
  esac
  command+=(--codistill)
  exchange_flags "$2" "$3" "$4"
  ((value[part] == 1)) || command+=(--codistill-data-fraction "$(awk "BEGIN { printf \"%.10g\", 1 / ${value[part]} }")")
  [[ ! -e $5/last.pth.tar ]] || command+=(--resume "$5/last.pth.tar")
}

# per_model EPOCHS MODELS: each of several models has fewer workers, hence sees fewer epochs in the same updates.
per_model() { awk "BEGIN { print $1 / $2 }"; }

# warmup_from MODELS: the rate at which warm-up starts; no higher than the one it leads to.
warmup_from() {
  local images=$((value[batch] * value[workers] / $1))
  awk "BEGIN { print ${value[lr]} * ($images < 256 ? $images / 256 : 1) }"
}

# optimiser_flags MODELS. The schedule advances at every update, as Goyal's does; stepped by epochs, timm would also
# reach each milestone an epoch early. timm's `sgd` has Nesterov's momentum and decays no bias or BatchNorm weight.
optimiser_flags() {
  local milestones=("${shifted_milestones[@]}") i
  [[ ${value[schedule]} != goyal ]] || milestones=("${goyal_milestones[@]}")
  for i in "${!milestones[@]}"; do milestones[i]=$((milestones[i] * value[part] / $1)); done
  command+=(--epochs $((epochs * value[part] / $1)))
  command+=(--opt sgd --momentum 0.9 --weight-decay "${weight_decays[0]}")
  command+=(--lr-base "${value[lr]}" --lr-base-size 256 --lr-base-scale linear)
  command+=(--sched-on-updates --warmup-lr "$(warmup_from "$1")")
  if [[ ${value[schedule]} == cosine ]]; then
    command+=(--sched cosine --min-lr 0)
  else
    command+=(--sched multistep --decay-rate 0.1 --decay-milestones "${milestones[@]}")
  fi
  [[ ${value[weight_decay]} == constant ]] || command+=(--codistill-weight-decay "$(decreasing "$1")")
}

# The weight decay changes with the shifted milestones, whatever the learning rate does.
decreasing() {
  local first=$((shifted_milestones[0] * value[part] / $1)) second=$((shifted_milestones[1] * value[part] / $1))
  echo "0:${weight_decays[0]},$first:${weight_decays[1]},$second:${weight_decays[2]}"
}

# Random crops of 224 × 224 at any scale and aspect ratio, flips, no more; validation on the centre of 256: as in Goyal.
augmentation_flags() {
  command+=(--smoothing 0 --color-jitter 0 --crop-pct 0.875 --interpolation bilinear --train-interpolation bilinear)
}
