"""Every number that the reproduction adds to the demo's: regimes, seeds, margins, and what was searched.

The vision regimes keep the paper's epochs (Goyal et al. 2017: 90 for one model on all workers, 45 for each of two) and
its milestones, on 512 digits. The translations are the demo's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["resnet", "resnext", "nmt"]
Way = Literal["all_reduce", "codistill"]
Kind = Literal["all_reduce", "codistill", "independent", "constant"]
Schedule = Literal["goyal", "shifted", "cosine"]

SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = tuple(range(10))  # where half a point of accuracy matters
FEW_SEEDS = SEEDS[:3]  # where translations are swept
SEARCH_SEEDS = (100, 101)  # none of those that are reported
# How much worse is still called the same: percent, bits a subword, share of the training loss.
MARGINS = {"top1": 0.5, "averaged_top1": 0.5, "valid_nll": 0.05, "averaged_nll": 0.05, "train_loss": 0.1}

# Images. Updates of every worker: 45 epochs of 32 images for each of two models, 90 of 64 for one on both workers.
IMAGES = 512
VALIDATION = 1285  # the rest of scikit-learn's 1,797 scans
TOGETHER = 0.9  # least share of a codistilling training's intervals at whose end all peers are in use
BATCH = 32
EPOCHS = 45
QUICK_EPOCHS = 3
VALIDATIONS = 15
WARMUP = 1 / 15  # the paper's 5 of 90 epochs would be 2.5 of 45: timm counts whole ones
CROP = (0.35, 1.0)  # random crops, as on ImageNet; no mirror images of digits
MILESTONES: dict[Schedule, tuple[float, ...]] = {
    "goyal": (30 / 90, 60 / 90, 80 / 90),
    "shifted": (18 / 45, 38 / 45, 44 / 45),
    "cosine": (),
}
DECREASE = ((0.0, 1.0), (18 / 45, 0.1), (38 / 45, 0.0))  # (share of the training, of the weight decay): paper
INTERVAL = 8  # updates: 90 exchanges in a training, as in the paper (2,500 of 225,000)
MODELS: dict[str, dict[str, Any]] = {
    "resnet": {"model": "resnet10t", "channels": (8, 16, 32, 64), "stem": 8},
    "resnext": {
        "model": "resnext50_32x4d",
        "channels": (8, 16, 32, 64),
        "stem": 8,
        "kwargs": ("stem_type=deep", "layers=(1,1,1,1)", "cardinality=4", "base_width=32"),
    },
}

# Translations: the demo's regime; a quick one in its proportions.
NMT_INTERVAL = 20
QUICK_UPDATES = 100


@dataclass(frozen=True)
class Tuned:
    """What was searched for each kind of training, over the same grid: `regularisation` is weight decay or dropout.

    Kind "constant" is all_reduce as in Goyal et al. 2017: their milestones, a weight decay that stays as it is.
    """

    lr: float
    regularisation: float


GRIDS: dict[Task, tuple[Tuned, ...]] = {
    "resnet": tuple(Tuned(lr, decay) for lr in (0.03, 0.1, 0.3, 1.0) for decay in (1e-4, 1e-3)),
    "resnext": tuple(Tuned(lr, decay) for lr in (0.03, 0.1, 0.3, 1.0) for decay in (1e-4, 1e-3)),
    "nmt": tuple(Tuned(3e-3, dropout) for dropout in (0.05, 0.1, 0.2, 0.3, 0.4)),
}
# What `python -m recipes.embedded.reproduce --search` printed.
CHOSEN: dict[tuple[Task, Kind], Tuned] = {
    ("resnet", "all_reduce"): Tuned(0.3, 1e-3),
    ("resnet", "constant"): Tuned(0.1, 1e-3),
    ("resnet", "codistill"): Tuned(0.1, 1e-4),
    ("resnet", "independent"): Tuned(0.1, 1e-3),
    ("resnext", "all_reduce"): Tuned(0.3, 1e-3),
    ("resnext", "codistill"): Tuned(0.1, 1e-3),
    ("nmt", "all_reduce"): Tuned(3e-3, 0.3),
    ("nmt", "codistill"): Tuned(3e-3, 0.1),
    ("nmt", "independent"): Tuned(3e-3, 0.2),
}
