#!/usr/bin/env bash
# Figure 12: ResNet-50 on ImageNet as in Figure 2 (a), but with a constant weight decay of 1e-4.
# Claim: shifted milestones alone do not close the gap: codistillation lags behind all_reduce.
# Read: train_loss and eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "one model on all workers" weight_decay=constant
job codistill "" "two models, each on half of the workers" weight_decay=constant
main "$@"
