#!/usr/bin/env bash
# Figure 3 (a, b) and Table A.2: ResNet-50 on ImageNet, the batch of a worker doubled several times; each time the
# learning rate doubles and the updates halve.
# Claim: no significant degradation over a wide range of batch sizes.
# Read: train_loss and eval_top1 in summary.csv. Not known: whether the paper shows all_reduce here too, and whether the
# interval between snapshots stays the same number of updates, as it does here.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

for batch in $BATCHES; do
  job all_reduce "batch-$batch" "one model, $batch images a worker" batch="$batch"
  job codistill "batch-$batch" "two models, $batch images a worker" batch="$batch"
done
main "$@"
