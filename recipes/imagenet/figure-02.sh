#!/usr/bin/env bash
# Figure 2 (a, b): ResNet-50 and ResNeXt-101 on ImageNet, with decreasing weight decay and shifted milestones.
# Claim: validation accuracy matches all_reduce though the training loss stays higher.
# Read: eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

for model in resnet50 "$RESNEXT"; do
  job all_reduce "$model" "one $model on all workers" model="$model"
  job codistill "$model" "two, each on half of the workers" model="$model"
done
main "$@"
