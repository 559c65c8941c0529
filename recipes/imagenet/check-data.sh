#!/usr/bin/env bash
# Checks that DATA holds ImageNet (ILSVRC 2012) as a folder of images: train/ and val/ (or validation/), in each a
# folder for each of the same 1,000 classes, with 1,281,167 and 50,000 images in all. Takes minutes on a network file
# system.
#
#   DATA=/data/imagenet recipes/imagenet/check-data.sh
#
# The images come from https://image-net.org, by hand, with an account; the validation set must be sorted into class
# folders.
set -euo pipefail

die() {
  echo "check-data.sh: $*" >&2
  exit 1
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  exit
fi
[[ -n ${DATA:-} ]] || die "DATA is not set: must be the folder that holds train/ and val/; set DATA=/data/imagenet"
[[ -d $DATA ]] || die "DATA=$DATA: no such folder; set DATA to the one that holds train/ and val/"
train=$DATA/train
val=$DATA/validation # the first that timm looks for
[[ -d $val ]] || val=$DATA/val

classes() { (cd "$1" && find -L . -mindepth 1 -maxdepth 1 -type d) | sort; }

check() { # FOLDER IMAGES
  [[ -d $1 ]] || die "$1: no such folder; unpack ImageNet into $DATA/train and $DATA/val"
  local folders images
  folders=$(classes "$1" | wc -l)
  ((folders == 1000)) || die "$1: has $folders class folders, must be 1000; sort the images into one folder a class"
  images=$(find -L "$1" -mindepth 2 -maxdepth 2 -type f \( -iname '*.jpeg' -o -iname '*.jpg' \) | wc -l)
  ((images == $2)) || die "$1: has $images images, must be $2; unpack ImageNet again"
}

check "$train" 1281167
check "$val" 50000
different=$(comm -3 <(classes "$train") <(classes "$val") | tr -d '\t' | sed -n 1p)
[[ -z $different ]] ||
  die "${different#./}: is a class folder of only one of $train and $val; give both the same classes"
echo "$DATA: 1000 classes, 1281167 images to train on, 50000 to validate"
