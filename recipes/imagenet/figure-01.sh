#!/usr/bin/env bash
# Figure 1 (a, b, c): ResNet-50 on ImageNet with codistillation out of the box, the schedules of Goyal et al. 2017
# merely halved.
# Claim: the two models over-regularise: higher training loss, lower accuracy, parameters nearer to their start.
# Read: train_loss and eval_top1 in summary.csv, distance in metrics.jsonl.
# shellcheck source=recipes/imagenet/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

settings_of_figure=(schedule=goyal weight_decay=constant)
job all_reduce "" "one model on all workers" "${settings_of_figure[@]}"
job codistill "" "two models, each on half of the workers" "${settings_of_figure[@]}"
main "$@"
