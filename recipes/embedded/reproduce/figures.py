"""The table: for every figure of the paper what is trained and drawn.

Runs, pictures and the page follow from it; what the figures are to show is in `claims`. Beyond the paper's seventeen
figures it holds questions of our own, on the same tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import log2

from recipes.embedded.reproduce.settings import FEW_SEEDS, MORE_SEEDS, SEEDS
from recipes.embedded.reproduce.trainings import Cell


@dataclass(frozen=True)
class Curves:
    """A metric against updates, a line a cell; the title tells two panels of a figure apart."""

    metric: str
    lines: Mapping[str, Cell]
    title: str = ""


@dataclass(frozen=True)
class Sweep:
    """A metric at the end against what is varied.

    Args:
        metric: at the end of a training.
        lines: points by name, x increasing.
        x: what is varied.
        levels: cells that do not vary, as level lines.
        title: tells two panels of a figure apart.
        doubling: the points are at the logarithms to base 2 of what is varied.
    """

    metric: str
    lines: Mapping[str, Sequence[tuple[float, Cell]]]
    x: str
    levels: Mapping[str, Cell] = field(default_factory=dict)
    title: str = ""
    doubling: bool = True

    @property
    def ticks(self) -> Mapping[float, str]:
        """What is varied, by where its points are."""
        return {x: f"{2**x if self.doubling else x:g}" for line in self.lines.values() for x, _ in line}


@dataclass(frozen=True)
class Numbers:
    """Metrics at the end that are given as numbers alone: name, cell, metric."""

    rows: Sequence[tuple[str, Cell, str]]


@dataclass(frozen=True)
class Figure:
    """What is shown.

    Args:
        key: the paper's number, or a word.
        title: what it is about.
        panels: what is drawn, in order.
        seeds: of every training it needs.
    """

    key: str
    title: str
    panels: Sequence[Curves | Sweep | Numbers]
    seeds: Sequence[int] = SEEDS

    def cells(self) -> list[Cell]:
        """What has to be trained for it, each once."""
        return list(dict.fromkeys(cell for panel in self.panels for cell in _cells(panel)))

    def shown(self) -> set[tuple[Cell, str]]:
        """Cells and metrics that it shows."""
        found = set()
        for panel in self.panels:
            if isinstance(panel, Numbers):
                found |= {(cell, metric) for _, cell, metric in panel.rows}
            else:
                found |= {(cell, panel.metric) for cell in _cells(panel)}
        return found


def _cells(panel: Curves | Sweep | Numbers) -> list[Cell]:
    if isinstance(panel, Curves):
        return list(panel.lines.values())
    if isinstance(panel, Numbers):
        return [cell for _, cell, _ in panel.rows]
    return [*panel.levels.values(), *(cell for line in panel.lines.values() for _, cell in line)]


REDUCE, PEERS = Cell("resnet", "all_reduce"), Cell("resnet", "codistill")
REDUCE_X, PEERS_X = Cell("resnext", "all_reduce"), Cell("resnext", "codistill")
REDUCE_T, PEERS_T = Cell("nmt", "all_reduce"), Cell("nmt", "codistill")
GOYAL, BOX = (replace(cell, schedule="goyal", decreasing=False) for cell in (REDUCE, PEERS))
REDUCE_CONSTANT, PEERS_CONSTANT = (replace(cell, decreasing=False) for cell in (REDUCE, PEERS))
COSINE, COSINE_PEERS = (replace(cell, schedule="cosine") for cell in (REDUCE, PEERS))
COSINE_X, COSINE_PEERS_X = (replace(cell, schedule="cosine") for cell in (REDUCE_X, PEERS_X))
APART, APART_T = (replace(cell, alpha=0.0) for cell in (PEERS, PEERS_T))
SMOOTH = replace(REDUCE, smoothing=0.1)

_NAMES = ("all_reduce", "codistill")
BATCHES = (1, 2, 4)
_PARTS = (1, 2, 4, 8)
_OFTEN = (0.5, 1.0, 2.0, 4.0)
_OFTEN_T = (0.25, 0.5, 1.0)
_RATES = (0.5, 1.0, 2.0, 4.0)
ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
STARTS = {  # growth: alpha at the start
    1.0: (0.25, 0.5, 1.0, 2.0),
    1.1: (0.125, 0.25, 0.5, 1.0),
    1.5: (0.0005, 0.002, 0.008, 0.032),
}


def _pair(metric: str, one: Cell, other: Cell) -> Curves:
    return Curves(metric, dict(zip(_NAMES, (one, other), strict=True)))


def _pairs(metric: str, pairs: Mapping[str, tuple[Cell, Cell]]) -> list[Curves]:
    return [replace(_pair(metric, *pair), title=name) for name, pair in pairs.items()]


def _swept(metric: str, entry: str, values: Sequence[float], x: str, *cells: Cell, **levels: Cell) -> Sweep:
    """`entry` of each cell takes each of `values`, which double."""
    lines = {cell.way: [(log2(value), replace(cell, **{entry: value})) for value in values] for cell in cells}
    return Sweep(metric, lines, x, levels)


def _parts_of_data(metric: str) -> Sweep:
    lines = {cell.way: [(-log2(part), replace(cell, part=part)) for part in reversed(_PARTS)] for cell in _BASE}
    return Sweep(metric, lines, "fraction of the images")


_BASE = (REDUCE, PEERS)
STEP = {"ResNet": (REDUCE, PEERS), "ResNeXt": (REDUCE_X, PEERS_X)}
COSINE_PAIRS = {"ResNet": (COSINE, COSINE_PEERS), "ResNeXt": (COSINE_X, COSINE_PEERS_X)}
_OFTEN_AXIS = "exchanges, times the base's"
_RATE_AXIS = "learning rate, times the tuned one"
GROWN = {
    growth: [replace(PEERS_T, growth=growth, alpha=alpha) for alpha in starts] for growth, starts in STARTS.items()
}


FIGURES = (
    Figure(
        "1",
        "ResNet, schedule and weight decay of the baseline: out of the box",
        [_pair("train_loss", GOYAL, BOX), _pair("top1", GOYAL, BOX), _pair("distance", GOYAL, BOX)],
        MORE_SEEDS,
    ),
    Figure(
        "2",
        "ResNet and ResNeXt, shifted milestones and decreasing weight decay: validation accuracy",
        _pairs("top1", STEP),
        MORE_SEEDS,
    ),
    Figure(
        "3",
        "ResNet, larger batches at larger learning rates and fewer updates",
        [
            _swept(metric, "batch", BATCHES, "images per worker, times the base's", *_BASE)
            for metric in ("train_loss", "top1")
        ],
        MORE_SEEDS,
    ),
    Figure(
        "4",
        "ResNet and ResNeXt, cosine schedule: validation accuracy",
        _pairs("top1", COSINE_PAIRS),
        MORE_SEEDS,
    ),
    Figure("5", "Transformer: validation NLL", [_pair("valid_nll", REDUCE_T, PEERS_T)]),
    Figure(
        "6",
        "ResNet, a fraction of the images at the same number of updates",
        [_parts_of_data("top1"), _parts_of_data("train_loss")],
    ),
    Figure(
        "7",
        "ResNet, frequency of exchange and learning rate: validation accuracy",
        [
            _swept("top1", "often", _OFTEN, _OFTEN_AXIS, PEERS, all_reduce=REDUCE),
            _swept("top1", "lr", _RATES, _RATE_AXIS, PEERS, all_reduce=REDUCE),
        ],
        MORE_SEEDS,
    ),
    Figure(
        "8",
        "The trainings of Figure 2: training loss",
        _pairs("train_loss", STEP),
        MORE_SEEDS,
    ),
    Figure(
        "9",
        "The ResNets of Figure 2: training loss and validation accuracy",
        [_pair("train_loss", REDUCE, PEERS), _pair("top1", REDUCE, PEERS)],
        MORE_SEEDS,
    ),
    Figure(
        "10",
        "The ResNeXts of Figure 2: training loss and validation accuracy",
        [_pair("train_loss", REDUCE_X, PEERS_X), _pair("top1", REDUCE_X, PEERS_X)],
        MORE_SEEDS,
    ),
    Figure(
        "11",
        "The trainings of Figure 4: training loss",
        _pairs("train_loss", COSINE_PAIRS),
        MORE_SEEDS,
    ),
    Figure(
        "12",
        "ResNet, shifted milestones, but the weight decay stays constant",
        [
            Curves(
                metric,
                {
                    "all_reduce": REDUCE_CONSTANT,
                    "codistill": PEERS_CONSTANT,
                    "codistill, weight decay decreasing": PEERS,
                },
            )
            for metric in ("train_loss", "top1")
        ],
        MORE_SEEDS,
    ),
    Figure(
        "13",
        "ResNet, weight α of the penalty, constant during a training",
        [
            _swept(metric, "alpha", ALPHAS, "α", PEERS, all_reduce=REDUCE, independent=APART)
            for metric in ("train_loss", "top1")
        ],
    ),
    Figure(
        "14",
        "Transformer: training NLL",
        [
            _pair("train_nll", REDUCE_T, PEERS_T),
            Numbers([(name, cell, "clean_train_nll") for name, cell in zip(_NAMES, (REDUCE_T, PEERS_T), strict=True)]),
        ],
    ),
    Figure(
        "15",
        "The trainings of Figure 7: training loss",
        [
            _swept("train_loss", "often", _OFTEN, _OFTEN_AXIS, PEERS, all_reduce=REDUCE),
            _swept("train_loss", "lr", _RATES, _RATE_AXIS, PEERS, all_reduce=REDUCE),
        ],
        MORE_SEEDS,
    ),
    Figure(
        "16",
        "Transformer, frequency of exchange",
        [_swept("valid_nll", "often", _OFTEN_T, _OFTEN_AXIS, PEERS_T, all_reduce=REDUCE_T)],
    ),
    Figure(
        "17",
        "Transformer, weight α that grows by γ every epoch",
        [
            Sweep(
                "valid_nll",
                {f"γ = {growth:g}": [(log2(cell.alpha), cell) for cell in cells] for growth, cells in GROWN.items()},
                "α at the start",
                {"all_reduce": REDUCE_T},
            )
        ],
        FEW_SEEDS,
    ),
    Figure(
        "peers",
        "More peers, of one worker each: not the same number of workers",
        [
            Sweep(
                metric,
                {"codistill": [(n, replace(cell, peers=n)) for n in (2, 3, 4)]},
                "peers",
                {"independent": apart},
                name,
                doubling=False,
            )
            for name, metric, cell, apart in (
                ("ResNet", "top1", PEERS, APART),
                ("Transformer", "valid_nll", PEERS_T, APART_T),
            )
        ],
        FEW_SEEDS,
    ),
    Figure(
        "ensemble",
        "Two peers, two independent models, and the ensembles of both",
        [
            Numbers(
                [
                    ("ResNet, a peer", PEERS, "top1"),
                    ("ResNet, an independent model", APART, "top1"),
                    ("ResNet, ensemble of two independent models", APART, "ensemble_top1"),
                    ("ResNet, ensemble of both peers", PEERS, "ensemble_top1"),
                    ("ResNet, all_reduce", REDUCE, "top1"),
                    ("Transformer, a peer", PEERS_T, "valid_nll"),
                    ("Transformer, an independent model", APART_T, "valid_nll"),
                    ("Transformer, ensemble of two independent models", APART_T, "ensemble_nll"),
                    ("Transformer, ensemble of both peers", PEERS_T, "ensemble_nll"),
                    ("Transformer, all_reduce", REDUCE_T, "valid_nll"),
                ]
            )
        ],
        FEW_SEEDS,
    ),
    Figure(
        "smoothing",
        "Label smoothing in place of codistillation",
        [
            Numbers(
                [
                    ("ResNet, all_reduce", REDUCE, "top1"),
                    ("ResNet, all_reduce, label smoothing 0.1", SMOOTH, "top1"),
                    ("ResNet, codistill", PEERS, "top1"),
                ]
            ),
            Sweep(
                "valid_nll",
                {
                    "all_reduce": [
                        (0.0, replace(REDUCE_T, smoothing=0.0)),
                        (0.1, REDUCE_T),
                        (0.2, replace(REDUCE_T, smoothing=0.2)),
                    ]
                },
                "label smoothing, Transformer (0.1 is the base's)",
                {"codistill, 0.1": PEERS_T},
                doubling=False,
            ),
        ],
        FEW_SEEDS,
    ),
    Figure(
        "averaging",
        "The mean of both models' weights as one model",
        [
            Numbers(
                [
                    ("ResNet, a peer", PEERS, "top1"),
                    ("ResNet, a peer, BatchNorm's statistics measured anew", PEERS, "again_top1"),
                    ("ResNet, averaged peers", PEERS, "averaged_top1"),
                    ("ResNet, averaged independent models", APART, "averaged_top1"),
                    ("Transformer, a peer", PEERS_T, "valid_nll"),
                    ("Transformer, averaged peers", PEERS_T, "averaged_nll"),
                    ("Transformer, averaged independent models", APART_T, "averaged_nll"),
                ]
            )
        ],
        FEW_SEEDS,
    ),
    Figure(
        "agreement",
        "Share of training positions where both peers have the same most likely class",
        [Curves("agreement", {"ResNet": PEERS, "Transformer": PEERS_T})],
        FEW_SEEDS,
    ),
    Figure(
        "churn",
        "Share of validation predictions that change from one seed to the next",
        [
            Numbers(
                [
                    (f"{task}, {name}", cell, "churn")
                    for task, pair in (("ResNet", _BASE), ("Transformer", (REDUCE_T, PEERS_T)))
                    for name, cell in zip(_NAMES, pair, strict=True)
                ]
            )
        ],
    ),
)
