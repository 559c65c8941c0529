#!/usr/bin/env bash
# Figure 4: ResNet-50 and ResNeXt-101 on ImageNet with a cosine learning rate schedule.
# Claim: the final validation accuracy of both arms is very close with this schedule too.
# Read: eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

for model in resnet50 "$RESNEXT"; do
  job all_reduce "$model" "one $model on all workers" model="$model" schedule=cosine
  job codistill "$model" "two, each on half of the workers" model="$model" schedule=cosine
done
main "$@"
