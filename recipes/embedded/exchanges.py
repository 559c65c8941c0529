"""Ways to codistil, side by side on the demo's data: by checkpoint, by prediction, on a ring, between unlike models.

Every finished training is reused, the demo's too. Whatever goes wrong ends in one line and exit status 1 (Ctrl-C and
SIGTERM: 130), with no process left behind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from recipes.embedded import commandline, measures
from recipes.embedded.nmt import demo as nmt
from recipes.embedded.nmt import results as nmt_results
from recipes.embedded.nmt.arms import Arm as NmtArm
from recipes.embedded.nmt.settings import Corpus
from recipes.embedded.nmt.settings import Training as NmtTraining
from recipes.embedded.progress import Progress, clock
from recipes.embedded.report import table, thousands
from recipes.embedded.steps import exclusive
from recipes.embedded.variants import CHECKPOINT, VARIANTS, Variant
from recipes.embedded.vision import demo as vision
from recipes.embedded.vision import results as vision_results
from recipes.embedded.vision.arms import Arm as VisionArm
from recipes.embedded.vision.demo import spread

HALVES = ("nmt", "vision")
SEEDS = {"nmt": (1, 11, 21), "vision": (0, 1, 2, 3, 4)}  # of fairseq's peers: the seed itself and those after it
HEADER = ("", "best", "at the end", "less checkpoint", "together", "agreement", "wall", "bytes/update")


@dataclass(frozen=True)
class Outcome:
    """What one peer came to from one seed; `best` and `end` in the half's own unit, `sent` in bytes per update."""

    variant: str
    seed: int
    peer: int
    best: float
    end: float
    together: float
    agreement: float
    sent: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not trained yet, print one table a half, and return the exit status."""
    args = _parser().parse_args(argv)
    return commandline.run(lambda progress: _work(args, progress))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded.exchanges",
        description=f"Compares {', '.join(variant.name for variant in VARIANTS)} on the demo's translation and digits, "
        "from several seeds. About 40 minutes of training on two CPU cores, once.",
    )
    parser.add_argument("--only", choices=HALVES, help="one half alone")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for downloads and results (data)")
    parser.add_argument("--updates", type=commandline.updates, help="updates of every worker, for a quick try")
    return parser


def _work(args: argparse.Namespace, progress: Progress) -> None:
    for half in HALVES if args.only is None else (args.only,):
        with exclusive(args.data / half):
            outcomes = {"nmt": _nmt, "vision": _vision}[half](args.data, args.updates, progress)
            report = _report(half, outcomes)
            place = args.data / half
            (place / "exchanges.txt").write_text(report + "\n", encoding="utf-8")
            text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
            (place / "exchanges.json").write_text(text + "\n", encoding="utf-8")
        progress.say(f"\n-- {half} --\n{report}\n")


def _nmt(data: Path, updates: int | None, progress: Progress) -> list[Outcome]:
    training = NmtTraining() if updates is None else NmtTraining(updates=updates)
    nmt.prepare_corpus(data, Corpus(), progress)

    def train(variant: Variant, seed: int, label: str) -> list[Outcome]:
        place = data / "nmt"
        chosen = replace(training, seed=seed)
        arm = NmtArm(CHECKPOINT.name, Corpus(), chosen, place / "corpus", place / "arms", variant)
        seconds = nmt.train_arm(arm, label, progress)
        found = []
        for peer in range(arm.members):
            log = nmt_results.read_log(arm.log(peer))
            metrics = measures.read_metrics(arm.save_dir(peer) / "metrics.jsonl")
            sent = measures.sent_bytes(metrics) / training.updates
            shared = measures.together(metrics), measures.agreement(metrics)
            found.append(Outcome(variant.name, seed, peer, log.best[1], log.end, *shared, sent, seconds))
        return found

    return _all(train, SEEDS["nmt"])


def _vision(data: Path, updates: int | None, progress: Progress) -> list[Outcome]:
    training = vision.regime(updates)
    digits = vision.prepare_digits(data, progress)

    def train(variant: Variant, seed: int, label: str) -> list[Outcome]:
        arm = VisionArm(CHECKPOINT.name, seed, training, digits, data / "vision" / "arms", variant)
        seconds = vision.train_arm(arm, label, progress)
        found = []
        for peer, run in enumerate(vision.read_arm(arm, seconds)):
            metrics = measures.read_metrics(arm.save_dir(peer) / "metrics.jsonl")
            best, shared = (
                vision_results.best(run.validations),
                (measures.together(metrics), measures.agreement(metrics)),
            )
            found.append(Outcome(variant.name, seed, peer, best, run.end.top1, *shared, run.sent, seconds))
        return found

    return _all(train, SEEDS["vision"])


def _all(train: Callable[[Variant, int, str], list[Outcome]], seeds: Sequence[int]) -> list[Outcome]:
    cells = [(variant, seed) for seed in seeds for variant in VARIANTS]
    return [
        outcome
        for number, (variant, seed) in enumerate(cells, start=1)
        for outcome in train(variant, seed, f"[{number}/{len(cells)} {variant.name}, seed {seed}]")
    ]


def _report(half: str, outcomes: Sequence[Outcome]) -> str:
    digits = {"nmt": 3, "vision": 1}[half]
    base = {
        seed: mean(o.end for o in outcomes if (o.variant, o.seed) == (CHECKPOINT.name, seed)) for seed in SEEDS[half]
    }
    rows = []
    for variant in VARIANTS:
        for peer in range(variant.peers):
            own = [outcome for outcome in outcomes if (outcome.variant, outcome.peer) == (variant.name, peer)]
            rows.append(
                [
                    f"{variant.name}, peer {peer}{', deeper' if variant.unlike and peer % 2 else ''}",
                    spread([outcome.best for outcome in own], digits),
                    spread([outcome.end for outcome in own], digits),
                    spread([outcome.end - base[outcome.seed] for outcome in own], digits),
                    f"{100 * mean(outcome.together for outcome in own):.0f} %",
                    f"{mean(outcome.agreement for outcome in own):.2f}",
                    clock(mean(outcome.seconds for outcome in own)),
                    thousands(mean(outcome.sent for outcome in own)),
                ]
            )
    what = {
        "nmt": "best, at the end: validation NLL in bits per subword (lower is better)",
        "vision": "best, at the end: validation top-1 in percent (higher is better)",
    }[half]
    notes = [
        f"{what}; mean ± standard deviation over seeds {SEEDS[half]}.",
        "less checkpoint: at the end, less the mean of the two peers that exchange checkpoints, seed by seed.",
        "together: share of the run with a peer in use. agreement: share of training positions, near the end, where a",
        "  peer's most likely class is the others' too.",
        "wall: one seed, all peers side by side on two cores. bytes/update: sent by one worker.",
    ]
    return "\n".join([table(HEADER, rows), "", *notes])


if __name__ == "__main__":
    sys.exit(main())
