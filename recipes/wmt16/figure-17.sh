#!/usr/bin/env bash
# Figure 17: the "big" Transformer on WMT'16 En-De, with the weight α_0 · γ^t of the penalty; for each γ several α_0, of
# which the best counts.
# Claim: a weight that grows (γ = 1.1, 1.5) does slightly better than a constant one (γ = 1).
# Read: valid_nll_loss in train.log (bits). Not known: the unit of t; ALPHA_EVERY is an epoch here.
# shellcheck source=recipes/wmt16/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "for comparison: the run of Figure 5"
for growth in $GROWTHS; do
  for alpha in $ALPHAS; do
    job codistill "gamma-$growth-alpha-$alpha" "weight $alpha · $growth^t" growth="$growth" alpha="$alpha"
  done
done
main "$@"
