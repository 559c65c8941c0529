# shellcheck shell=bash disable=SC2034,SC2154 # train.sh, which sources this, uses and sets the rest
# Every setting of the translation experiments, once; sourced. Each is an environment variable too, its name in
# capitals. "Paper": Sodhani et al. 2020 (arXiv 2010.02838), which names WMT'16 En-De, the "big" Transformer and the
# set-up of Ott et al. 2018 (arXiv 1806.00187); "Ott" marks what fairseq's examples/scaling_nmt/README.md gives for
# that, "iwslt" what its examples/translation/README.md gives for IWSLT'14. "Not known" marks what we did not find in
# the paper: our choice, to be set. `task` (wmt16 or iwslt14) chooses the column; `column A B` picks A for wmt16, B for
# iwslt14.
column() { [[ $task == wmt16 ]] && echo "$1" || echo "$2"; }

# Sizes. Two models have half of the workers each; updates and the learning rate schedule, which counts updates, are the
# same for all (the paper's rule of comparison).
setting workers "$(column 16 2)" whole       # GPUs of an experiment, whatever the number of models. Not known.
setting tokens "$(column 3584 4096)" whole   # most tokens a worker and batch. Ott; iwslt.
setting update_freq 1 whole                  # batches of one update. Not known; Ott's large batches: 16 on 8 GPUs.
setting updates "$(column 100000 50000)" whole # Not known.
setting precision "$(column float16 float32)" "float16 float32" # Ott: float16. fairseq takes --bf16 for a TPU.

# Model and optimiser: Ott, iwslt; what they have in common stands in train.sh. Not known: whether the learning rate
# depends on the batch, which differs between the arms.
setting arch "$(column transformer_vaswani_wmt_en_de_big transformer_iwslt_de_en)" name
setting lr 0.0005 number
setting warmup 4000 whole                    # updates
setting dropout 0.3 number
setting weight_decay "$(column 0.0 0.0001)" number
setting label_smoothing 0.1 number           # of all_reduce, and of every validation loss that is logged
# Paper: the explicit regularisation of codistilling models is reduced. Not known: which, and how far. Label smoothing
# is what the text names as the usual one, so that is 0 for them.
setting reduced_smoothing 0 number codistill

# Codistillation. Not certain: the distance; KL is that of Zhang et al. 2018 and Anil et al. 2018. Not known: the
# others.
setting loss kl "kl mse ce" codistill
setting alpha 1 number codistill             # α_0: the weight at the start
setting growth 1 number codistill            # γ: α is multiplied by it ...
setting alpha_every epoch name codistill     # ... every epoch, or every so many updates. Not known which.
setting interval "$(column 2500 250)" whole  # updates between snapshots

languages=$(column "en de" "de en")

# Sweeps, also environment variables.
points INTERVALS "5000 2500 1250 625"        # Figure 16. Not known.
points GROWTHS "1 1.1 1.5"                   # Figure 17. Paper.
points ALPHAS "0.01 0.03 0.1 0.3 1"          # Figure 17: α_0, swept for each γ (paper). Not known: the values.
