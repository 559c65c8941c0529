#!/usr/bin/env bash
# Figure 16: the "big" Transformer on WMT'16 En-De, with snapshots more or less often.
# Claim: nothing is lost when snapshots come less often.
# Read: valid_nll_loss in train.log (bits).
# shellcheck source=recipes/wmt16/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "for comparison: the run of Figure 5"
for interval in $INTERVALS; do
  job codistill "interval-$interval" "a snapshot every $interval updates" interval="$interval"
done
main "$@"
