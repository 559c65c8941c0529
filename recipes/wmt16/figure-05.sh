#!/usr/bin/env bash
# Figure 5: the "big" Transformer on WMT'16 En-De.
# Claim: all_reduce and codistillation reach a similar NLL on the validation set.
# Read: valid_nll_loss in train.log (bits).
# shellcheck source=recipes/wmt16/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "one model on all workers"
job codistill "" "two models, each on half of the workers"
main "$@"
