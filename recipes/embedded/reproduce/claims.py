"""What the figures are to show: every claim of the paper and every question of our own, in parts that can be judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from recipes.embedded.reproduce.figures import (
    ALPHAS,
    APART,
    APART_T,
    BATCHES,
    BOX,
    COSINE_PAIRS,
    GOYAL,
    GROWN,
    PEERS,
    PEERS_CONSTANT,
    PEERS_T,
    REDUCE,
    REDUCE_CONSTANT,
    REDUCE_T,
    SMOOTH,
    STEP,
)
from recipes.embedded.reproduce.trainings import Cell
from recipes.embedded.reproduce.verdicts import Part, Term, above, alike, below, better, not_worse


@dataclass(frozen=True)
class Claim:
    """What the paper (C1 ...) or a question of our own (Q1 ...) says, the figures that show it, and its parts."""

    key: str
    says: str
    figures: Sequence[str]
    parts: Sequence[Part]


def _trend_of_gain() -> Part:
    """How the lead of codistillation grows with every halving of the data: the slope of a straight line."""
    weights = {1: -0.3, 2: -0.1, 4: 0.1, 8: 0.3}
    terms = [
        Term(sign * weight, "top1", (replace(cell, part=part),))
        for part, weight in weights.items()
        for sign, cell in ((1, PEERS), (-1, REDUCE))
    ]
    return Part("the lead in accuracy grows with every halving of the images", tuple(terms), "above")


def _middle_is_better(end: float) -> Part:
    """The mean of the sweep's three middle values of α, one of which the settings were tuned at, above an end."""
    middle = [Term(1 / 3, "top1", (replace(PEERS, alpha=alpha),)) for alpha in ALPHAS[1:-1]]
    terms = (*middle, Term(-1.0, "top1", (replace(PEERS, alpha=end),)))
    return Part(f"accuracy is higher in the middle of the sweep than at α = {end:g}", terms, "above")


def _grown_is_better(growth: float) -> Part:
    terms = (Term(1.0, "valid_nll", tuple(GROWN[growth])), Term(-1.0, "valid_nll", tuple(GROWN[1.0])))
    return Part(f"γ = {growth:g} at its best α has a lower NLL than γ = 1 at its best α", terms, "below")


def _matches(what: str, metric: str, pairs: Mapping[str, tuple[Cell, Cell]]) -> list[Part]:
    return [
        part
        for name, (reduce, peers) in pairs.items()
        for part in (
            not_worse(f"{name}{what}: codistillation is not worse on validation", metric, peers, reduce),
            above(f"{name}{what}: its training loss is higher", "train_loss", peers, reduce),
        )
    ]


CLAIMS = (
    Claim(
        "C1",
        "Out of the box, codistillation regularises too much: higher training loss, lower accuracy, weights that stay "
        "closer to where they began.",
        ("1",),
        [
            above("training loss is higher", "train_loss", BOX, GOYAL),
            below("validation accuracy is lower", "top1", BOX, GOYAL),
            below("the distance from the initial weights is smaller", "distance", BOX, GOYAL),
        ],
    ),
    Claim(
        "C2",
        "With shifted milestones and a decreasing weight decay it is at least as accurate as all_reduce, though its "
        "training loss stays higher.",
        ("2", "8", "9", "10"),
        [
            *_matches("", "top1", STEP),
            not_worse("ResNet: not worse than all_reduce of Figure 1 either", "top1", PEERS, GOYAL),
        ],
    ),
    Claim(
        "C3",
        "The shifted milestones alone, with a constant weight decay, do not close the gap.",
        ("12",),
        [
            below("accuracy is lower than that of all_reduce", "top1", PEERS_CONSTANT, REDUCE_CONSTANT),
            below("accuracy is lower than with a decreasing weight decay", "top1", PEERS_CONSTANT, PEERS),
        ],
    ),
    Claim(
        "C4",
        "Codistillation scales over batch sizes per worker.",
        ("3",),
        [
            rule(f"batch ×{batch}: {words}", metric, replace(PEERS, batch=batch), PEERS)
            for batch in BATCHES[1:]
            for rule, metric, words in (
                (not_worse, "top1", "accuracy is not worse than at ×1"),
                (not_worse, "train_loss", "training loss is not worse than at ×1"),
            )
        ],
    ),
    Claim(
        "C5",
        "It does at least as well as all_reduce with a cosine schedule too, at a higher training loss.",
        ("4", "11"),
        _matches(", cosine", "top1", COSINE_PAIRS),
    ),
    Claim(
        "C6",
        "Transformer: a validation NLL that is no worse, and a worse training loss.",
        ("5", "14"),
        [
            not_worse("validation NLL is not worse", "valid_nll", PEERS_T, REDUCE_T),
            above("NLL of the training pairs, without dropout, is higher", "clean_train_nll", PEERS_T, REDUCE_T),
        ],
    ),
    Claim(
        "C7",
        "The less data, the more codistillation gains.",
        ("6",),
        [
            _trend_of_gain(),
            better("it gains with an eighth of the images", "top1", replace(PEERS, part=8), replace(REDUCE, part=8)),
        ],
    ),
    Claim(
        "C8",
        "It is robust to the frequency of exchange and to the learning rate.",
        ("7", "15", "16"),
        [
            *(
                not_worse(f"exchanges ×{often:g}: accuracy is not worse", "top1", replace(PEERS, often=often), PEERS)
                for often in (0.5, 2.0, 4.0)
            ),
            *(
                alike(f"exchanges ×{often:g}: training loss is alike", "train_loss", replace(PEERS, often=often), PEERS)
                for often in (0.5, 2.0, 4.0)
            ),
            not_worse("learning rate ×2: accuracy is not worse", "top1", replace(PEERS, lr=2.0), PEERS),
            not_worse("learning rate ×2: training loss is not worse", "train_loss", replace(PEERS, lr=2.0), PEERS),
            *(
                not_worse(f"Transformer, exchanges ×{often:g}: NLL is not worse", "valid_nll", other, PEERS_T)
                for often in (0.25, 0.5)
                for other in [replace(PEERS_T, often=often)]
            ),
        ],
    ),
    Claim(
        "C9",
        "The value of a constant α matters: much less and much more are both worse (our reading: what the paper's "
        "sweep comes to is not known).",
        ("13",),
        [_middle_is_better(end) for end in (ALPHAS[0], ALPHAS[-1])],
    ),
    Claim(
        "C10",
        "Transformer: an α that grows by γ does slightly better than a constant one.",
        ("17",),
        [_grown_is_better(growth) for growth in (1.1, 1.5)],
    ),
    Claim(
        "Q1",
        "Four peers are better than two.",
        ("peers",),
        [
            better("ResNet: higher accuracy", "top1", replace(PEERS, peers=4), PEERS),
            better("Transformer: lower NLL", "valid_nll", replace(PEERS_T, peers=4), PEERS_T),
        ],
    ),
    Claim(
        "Q2",
        "Codistillation is more than training two models: a peer is better than an independent model on one worker.",
        ("ensemble",),
        [
            better("ResNet: higher accuracy", "top1", PEERS, APART),
            better("Transformer: lower NLL", "valid_nll", PEERS_T, APART_T),
        ],
    ),
    Claim(
        "Q3",
        "One peer is as good as an ensemble of two independent models.",
        ("ensemble",),
        [
            not_worse("ResNet: accuracy", "top1", PEERS, APART, against="ensemble_top1"),
            not_worse("Transformer: NLL", "valid_nll", PEERS_T, APART_T, against="ensemble_nll"),
        ],
    ),
    Claim(
        "Q4",
        "Codistillation is more than label smoothing.",
        ("smoothing",),
        [
            better("ResNet: higher accuracy than all_reduce with label smoothing", "top1", PEERS, SMOOTH),
            Part(
                "Transformer: lower NLL than all_reduce at its best label smoothing",
                (
                    Term(1.0, "valid_nll", (PEERS_T,)),
                    Term(-1.0, "valid_nll", tuple(replace(REDUCE_T, smoothing=value) for value in (0.0, None, 0.2))),
                ),
                "below",
            ),
        ],
    ),
    Claim(
        "Q5",
        "The mean of both peers' weights is as good a model as a peer.",
        ("averaging",),
        [
            not_worse("ResNet: accuracy", "averaged_top1", PEERS, PEERS, against="again_top1"),
            not_worse("Transformer: NLL", "averaged_nll", PEERS_T, PEERS_T, against="valid_nll"),
        ],
    ),
    Claim(
        "Q6",
        "Predictions change less from seed to seed with codistillation (Anil et al. 2018 report that).",
        ("churn",),
        [
            below("ResNet: a peer's churn is less than all_reduce's", "churn", PEERS, REDUCE),
            below("Transformer: a peer's churn is less than all_reduce's", "churn", PEERS_T, REDUCE_T),
        ],
    ),
)
