"""Every number of the demo, in one place. What a training depends on is what its digest is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from recipes.embedded.steps import later

ARMS = ("all_reduce", "codistill", "alone")
SEEDS = (0, 1, 2, 3, 4)
GRID = (0.01, 0.03, 0.1)
GRID_SEEDS = SEEDS[:3]
SCANS = 1437  # in the training split that `data.write_digits` makes of scikit-learn's digits
VALIDATION = 360  # the other scans
DEEPER = "resnet14t"  # the model of every second peer, where peers are unlike


@dataclass(frozen=True)
class Training:
    """One regime for every arm; only the learning rate may differ, chosen for each arm over the same grid.

    Args:
        images: of the training split; which ones depends on the seed, the same for every arm.
        batch: images per worker and update; `images` is a multiple of it for one worker and for two.
        updates: of every worker; a multiple of an epoch of one worker.
        scans: in the training split, of which `images` are used.
        kwargs: more arguments of the model, as `--model-kwargs` wants them.
        augment: least and greatest share of a scan that a random crop shows; none: whole scans.
        warmup: share of the training.
        milestones: shares of the training after which the learning rate falls to a tenth; none: cosine.
        decay: (share of the training, weight decay from there on); none: `weight_decay` throughout.
        smoothing: of the labels.
        validations: how many, evenly spread; 0: after every epoch.
        validation: scans that are validated on.
        by_update: a cosine schedule goes on at every update; else at every epoch.
        shuffled: the workers of all_reduce go through the images in an order of the seed's own; else in that of seed 0,
            as with timm's train.py.
    """

    updates: int = 240
    images: int = 128
    batch: int = 16
    pixels: int = 32
    model: str = "resnet10t"
    channels: tuple[int, ...] = (16, 32, 64, 128)
    stem: int = 16
    crop: float = 1.0  # validate on whole scans; timm's default for the model enlarges and crops, training does not
    weight_decay: float = 1e-4
    loss: str = "kl"
    alpha: float = 1.0
    burn_in: int = 40
    interval: int = 20
    lr: Mapping[str, float] = field(default_factory=lambda: {"all_reduce": 0.1, "codistill": 0.03, "alone": 0.03})
    scans: int = later(SCANS)
    kwargs: tuple[str, ...] = later(())
    augment: tuple[float, float] | None = later(None)
    warmup: float = later(0.0)
    milestones: tuple[float, ...] = later(())
    decay: tuple[tuple[float, float], ...] = later(())
    smoothing: float = later(0.0)
    validations: int = later(0)
    validation: int = later(VALIDATION)
    by_update: bool = later(False)
    shuffled: bool = later(False)

    def __post_init__(self) -> None:
        whole = self.images // self.batch
        if self.updates < 1 or self.updates % whole:
            raise ValueError(f"{self.updates} updates: must be a multiple of {whole}, the updates of an epoch")
