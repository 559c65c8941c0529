#!/usr/bin/env bash
# Figure 11: the training loss of the runs of Figure 4 (cosine schedule). These are the same jobs in the same folders:
# nothing is trained twice.
# Claim: all_reduce reaches a lower training loss, at very similar validation accuracy.
# Read: train_loss in summary.csv.
# shellcheck source=recipes/imagenet/figure-04.sh
source "$(dirname "${BASH_SOURCE[0]}")/figure-04.sh"
