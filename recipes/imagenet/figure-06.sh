#!/usr/bin/env bash
# Figure 6: ResNet-50 on 1/k of ImageNet for k times the epochs, hence for the same number of updates.
# Claim: the less data, the more codistillation gains over all_reduce in validation accuracy.
# Read: the last eval_top1 and train_loss in summary.csv. All trainings of one k see the same images. Warm-up,
# milestones and weight decay keep their place in the training: they are k times as many epochs too.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

for part in $PARTS; do
  job all_reduce "part-$part" "one model, 1/$part of the images" part="$part"
  job codistill "part-$part" "two models, 1/$part of the images" part="$part"
done
main "$@"
