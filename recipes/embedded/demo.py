"""`make demo`: both halves, fairseq on sentence pairs and timm on digits, then both tables and one picture.

Each half reuses what it has finished, and leaves its own table and picture in its own folder. Whatever goes wrong ends
in one line and exit status 1 (Ctrl-C and SIGTERM: 130), with no process left behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from codistill import plots
from recipes.embedded import commandline
from recipes.embedded.nmt import demo as nmt
from recipes.embedded.nmt.settings import Training as NmtTraining
from recipes.embedded.progress import Progress
from recipes.embedded.vision import demo as vision

HALVES = ("nmt", "vision")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo (or the search) and return the exit status."""
    args = _parser().parse_args(argv)
    return commandline.run(lambda progress: _work(args, progress))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded.demo",
        description="Two peers codistil, beside one all_reduce model on the same two workers and one model alone: a "
        "Transformer of fairseq's on a small real English-German corpus, and a ResNet of timm's on scikit-learn's "
        "digits. About ten minutes of training on two CPU cores, once.",
    )
    parser.add_argument("--only", choices=HALVES, help="one half alone")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for downloads and results (data)")
    parser.add_argument(
        "--updates", type=commandline.updates, help="updates of every worker (each half has its own number)"
    )
    parser.add_argument("--search", action="store_true", help="instead, train every arm over its half's grid")
    return parser


def _work(args: argparse.Namespace, progress: Progress) -> None:
    chosen = HALVES if args.only is None else (args.only,)
    nmt_training = NmtTraining() if args.updates is None else NmtTraining(updates=args.updates)
    vision_training = vision.regime(args.updates) if "vision" in chosen else None
    outcomes = []
    for half in chosen:
        progress.say(f"-- {half} --")
        if half == "nmt":
            work, training = (nmt.search if args.search else nmt.demonstrate), nmt_training
        else:
            work, training = (vision.search if args.search else vision.demonstrate), vision_training
        outcomes.append(work(args.data, training, progress))
    if args.search:
        return
    for half, (report, _) in zip(chosen, outcomes, strict=True):
        progress.say(f"\n-- {half} --\n{report}")
    picture = args.data / "demo.png" if args.only is None else args.data / args.only / "demo.png"
    if args.only is None:
        plots.draw(picture, [panel for _, panel in outcomes])
    progress.say(f"\nvalidation curves: {picture}")


if __name__ == "__main__":
    sys.exit(main())
