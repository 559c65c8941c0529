#!/usr/bin/env bash
# The small translation set of the paper's text: IWSLT'14 De-En (153K pairs), a small Transformer.
# Claim: validation NLL 2.31 with codistillation, 2.37 with all_reduce.
# Read: valid_nll_loss in train.log (bits; not known: the unit of the paper's numbers).
task=iwslt14
# shellcheck source=recipes/wmt16/train.sh
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"

job all_reduce "" "one model on all workers"
job codistill "" "two models, each on half of the workers"
main "$@"
