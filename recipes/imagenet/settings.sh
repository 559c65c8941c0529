# shellcheck shell=bash disable=SC2034,SC2154 # train.sh, which sources this, uses and sets the rest
# Every setting of the ImageNet experiments, once; sourced. What is declared by `setting` or `points` is an environment
# variable too, its name in capitals.
# "Paper": Sodhani et al. 2020 (arXiv 2010.02838). "Goyal": Goyal et al. 2017 (arXiv 1706.02677), which it starts from.
# "Not known" marks what we did not find in the paper: our choice, to be set.

# Sizes. Epochs, milestones and warm-up are those of one model on all workers; with two models, each on half of the
# workers, they are halved, so that every worker takes as many updates (the paper's rule of comparison).
setting model resnet50 name
setting workers 16 whole            # GPUs of an experiment, whatever the number of models. Paper.
setting batch 32 whole              # images a worker and update. Paper.
setting part 1 whole                # train on 1/part of the images for part times the epochs (Figure 6).
setting precision float32 "float32 float16 bfloat16" # Not known; the two others are timm's --amp.
epochs=90                           # Goyal.
warmup=5                            # epochs; Goyal.
goyal_milestones=(30 60 80)         # Goyal; halved 15 30 40.
shifted_milestones=(36 76 88)       # halved 18 38 44: paper.

# Optimiser: SGD, Nesterov's momentum 0.9 (Goyal). lr is for 256 images an update, and proportional to the batch. What
# never changes (momentum, augmentation) stands in train.sh.
setting lr 0.1 number               # Goyal. Warm-up starts at this value.
setting schedule shifted "goyal shifted cosine"
setting weight_decay decreasing "constant decreasing"
weight_decays=(1e-4 1e-5 0)         # The first: Goyal. decreasing: the others from the first two of the shifted
                                    # milestones on (paper), whatever the schedule.
# Not known: whether all_reduce has the shifted milestones and the decreasing weight decay too. The captions of Figures
# 2 and 12 read as if it had, so it does; Figure 1's all_reduce is the one without.
# Not known: the weight decay under the cosine schedule (Figure 4).

# Codistillation.
setting interval 2500 whole         # updates between snapshots; no burn-in. Paper.
setting loss mse "mse kl ce" codistill # Not certain: the paper names the squared error of logits as an option. It
                                    # has no bound: too high a weight or learning rate diverges (docs/choosing.md).
setting alpha 1 number codistill    # Not known.

# Sweeps, also environment variables. Paper: half, once, twice and four times as often; learning rates 0.1, 0.2 and
# higher.
points RESNEXT resnext101_32x4d     # Not known which ResNeXt-101.
points INTERVALS "5000 2500 1250 625"
points LRS "0.1 0.2 0.4"            # Not known: the others.
points BATCHES "32 64 128 256"      # Not known: images a worker of Figure 3.
points PARTS "1 2 4 8"              # Not known: the fractions of Figure 6.
points ALPHAS "0.1 0.3 1 3 10"      # Not known: the values of Figure 13.
