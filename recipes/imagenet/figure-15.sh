#!/usr/bin/env bash
# Figure 15: the training loss of the runs of Figure 7. These are the same jobs in the same folders: nothing is trained
# twice.
# Claim: the training loss changes little with the interval, and none is lost with a learning rate of 0.2 instead of
# 0.1.
# Read: train_loss in summary.csv.
# shellcheck source=recipes/imagenet/figure-07.sh
source "$(dirname "${BASH_SOURCE[0]}")/figure-07.sh"
