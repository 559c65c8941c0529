#!/usr/bin/env bash
# Binarises a translation data set for the recipes here:
#
#   recipes/wmt16/prepare.sh wmt16 FOLDER OUT            # Google's preprocessed WMT'16 En-De, 32 k joined subwords
#   recipes/wmt16/prepare.sh iwslt14 FOLDER OUT          # IWSLT'14 De-En as fairseq's prepare-iwslt14.sh leaves it
#   recipes/wmt16/prepare.sh raw FOLDER OUT en de 32000  # plain text, a sentence a line, cut into 32 k joined subwords
#
# FOLDER holds what is read, OUT is made: give it to the recipes as DATA. For wmt16 unpack wmt16_en_de.tar.gz into
# FOLDER; fairseq's examples/scaling_nmt/README.md has the link, to be followed by hand. For raw, FOLDER holds
# {train,valid,test}.en and .de; IWSLT'14 takes `raw … de en 10000` too. DRY_RUN=1 prints the commands and runs nothing;
# a finished OUT is left as it is.
set -euo pipefail
here=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "prepare.sh: $*" >&2
  exit 2
}

do_it() {
  if [[ ${DRY_RUN:-0} != 0 ]]; then
    printf '%s\n' "$(printf '%q ' "$@")" | sed 's/ $//'
  else
    [[ -n $(type -P "$1") ]] || die "$1: no such command; activate the environment that has codistill"
    "$@"
  fi
}

# binarise SOURCE TARGET TRAIN VALID TEST OUT [FLAG …]: into a folder beside OUT, which gets its name when all is done.
binarise() {
  do_it rm -rf "$6.partial" # fairseq-preprocess will not go on with what is there
  do_it fairseq-preprocess --source-lang "$1" --target-lang "$2" --trainpref "$3" --validpref "$4" --testpref "$5" \
    --destdir "$6.partial" --workers 8 "${@:7}"
  do_it mv "$6.partial" "$6"
}

# need REMEDY PREFIX …: each PREFIX must exist in both languages, with as many lines.
need() {
  local prefix language
  for prefix in "${@:2}"; do
    for language in "$source" "$target"; do
      [[ -f $prefix.$language ]] || die "$prefix.$language: no such file; $1"
    done
    (($(wc -l <"$prefix.$source") == $(wc -l <"$prefix.$target"))) ||
      die "$prefix.$source: has not as many lines as $prefix.$target; $1"
  done
  echo "prepare.sh: $(wc -l <"$2.$source") pairs to train on" >&2
}

case ${1:-} in
  wmt16 | iwslt14) (($# == 3)) || die "$1 takes FOLDER and OUT; see -h" ;;
  raw) (($# == 6)) || die "raw takes FOLDER, OUT, two languages and a number of subwords; see -h" ;;
  -h | --help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" && exit ;;
  *) die "${1:-no data set named}: must be one of wmt16, iwslt14, raw; see -h" ;;
esac
folder=$2 out=${3%/} source=en target=de
[[ ! -e $out ]] || { echo "prepare.sh: $out: is there already; remove it to make it anew" >&2 && exit; }

case $1 in
  wmt16)
    train=$folder/train.tok.clean.bpe.32000
    valid=$folder/newstest2013.tok.bpe.32000
    test=$folder/newstest2014.tok.bpe.32000
    need "unpack Google's wmt16_en_de.tar.gz into $folder" "$train" "$valid" "$test"
    # As many words as fairseq's README for this set says: what is left over only pads the matrix.
    binarise en de "$train" "$valid" "$test" "$out" --joined-dictionary --nwordssrc 32768 --nwordstgt 32768
    ;;
  iwslt14)
    source=de target=en
    need "make it with fairseq's examples/translation/prepare-iwslt14.sh" "$folder"/{train,valid,test}
    binarise de en "$folder"/{train,valid,test} "$out"
    ;;
  raw)
    source=$4 target=$5
    [[ $6 =~ ^[1-9][0-9]*$ ]] || die "$6: must be a whole number of subwords, 1 or more; see -h"
    need "put one sentence a line there" "$folder"/{train,valid,test}
    do_it python "$here/subwords.py" "$folder" "$out.subwords" "$source" "$target" "$6"
    binarise "$source" "$target" "$out.subwords"/{train,valid,test} "$out" --joined-dictionary
    ;;
esac
