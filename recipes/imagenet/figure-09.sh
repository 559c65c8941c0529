#!/usr/bin/env bash
# Figure 9: training loss and validation accuracy of the runs of Figure 2. These are the same jobs in the same folders:
# nothing is trained twice. Not known: which of the two models this figure shows (Figures 9 and 10 have the same
# caption).
# Claim: all_reduce reaches a lower training loss, at very similar validation accuracy.
# Read: train_loss and eval_top1 in summary.csv.
# shellcheck source=recipes/imagenet/figure-02.sh
source "$(dirname "${BASH_SOURCE[0]}")/figure-02.sh"
