#!/usr/bin/env bash
# Figure 13: codistilling ResNet-50s on ImageNet with several values of α, constant during a training.
# Claim: how sensitive the result is to α. Not known: the model of this figure; ResNet-50 here.
# Read: train_loss and eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "for comparison: the run of Figure 2"
for alpha in $ALPHAS; do
  job codistill "alpha-$alpha" "weight $alpha of the penalty" alpha="$alpha"
done
main "$@"
