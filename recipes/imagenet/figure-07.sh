#!/usr/bin/env bash
# Figure 7: ResNet-50 on ImageNet, with snapshots more or less often (left) and other learning rates (right).
# Claim: accuracy changes little with the interval, and none is lost with a learning rate of 0.2 instead of 0.1.
# Read: eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "for comparison: the run of Figure 2"
for interval in $INTERVALS; do
  job codistill "interval-$interval" "left: a snapshot every $interval updates" interval="$interval"
done
for lr in $LRS; do
  job codistill "lr-$lr" "right: learning rate $lr for 256 images" lr="$lr"
done
main "$@"
