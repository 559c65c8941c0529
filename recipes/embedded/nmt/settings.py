"""Every number of the demo, in one place. What a step depends on is what its digest is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ARMS = ("all_reduce", "codistill", "alone")


@dataclass(frozen=True)
class Corpus:
    """Which strings, how many of them, and into how many subwords."""

    package: str = "homeassistant"
    version: str = "2026.11.0"
    source: str = "en"
    target: str = "de"
    least_words: int = 2
    most_words: int = 10
    train: int = 1500
    valid: int = 600
    test: int = 600
    seed: int = 1
    pieces: int = 1000

    @property
    def wheel(self) -> str:
        """File name of the wheel that holds the strings."""
        return f"{self.package}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Training:
    """One regime for every arm; only dropout differs, chosen for each arm over the same grid."""

    updates: int = 2000
    evaluate_every: int = 100
    tokens: int = 250  # per worker and update
    seed: int = 1
    dim: int = 128
    ffn: int = 256
    layers: int = 2
    heads: int = 4
    lr: float = 3e-3
    warmup: int = 80
    label_smoothing: float = 0.1
    alpha: float = 1.0
    burn_in: int = 60
    interval: int = 20
    dropout: Mapping[str, float] = field(
        default_factory=lambda: {"all_reduce": 0.3, "codistill": 0.1, "alone": 0.2},
    )


GRID = (0.1, 0.2, 0.3)
DEEPER = 3  # layers of every second peer, where peers are unlike
