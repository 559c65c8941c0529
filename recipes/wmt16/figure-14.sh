#!/usr/bin/env bash
# Figure 14: the training loss of the runs of Figure 5. These are the same jobs in the same folders: nothing is trained
# twice.
# Claim: codistillation is worse on the training set, and generalises well to the validation set.
# Read: train_nll_loss in train.log (bits).
# shellcheck source=recipes/wmt16/figure-05.sh
source "$(dirname "${BASH_SOURCE[0]}")/figure-05.sh"
