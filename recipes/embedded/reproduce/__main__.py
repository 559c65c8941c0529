"""`make reproduce`: train what is not trained yet of the figures asked for, then write pictures, verdicts and the page.

Every finished training is kept and reused, also by other figures; an interrupted one starts again clean. Whatever goes
wrong ends in one line and exit status 1 (Ctrl-C and SIGTERM: 130), with no process left behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.embedded import commandline
from recipes.embedded.progress import Progress
from recipes.embedded.reproduce import page, results, runner, search
from recipes.embedded.reproduce.figures import FIGURES, Curves, Figure, Numbers
from recipes.embedded.reproduce.trainings import Cell, Place
from recipes.embedded.steps import StepError, exclusive


def main(argv: Sequence[str] | None = None) -> int:
    """Reproduce, or search, and return the exit status."""
    args = _parser().parse_args(argv)
    return commandline.run(lambda progress: _work(args, progress), name="reproduce")


def _parser() -> argparse.ArgumentParser:
    keys = [figure.key for figure in FIGURES]
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded.reproduce",
        description="Trains every figure of the paper at embedded scale, draws it, and judges the paper's claims.",
    )
    parser.add_argument("--figure", action="append", choices=keys, metavar="KEY", help=f"one of: {', '.join(keys)}")
    parser.add_argument("--quick", action="store_true", help="one seed and a few updates of everything: does it work?")
    parser.add_argument("--search", action="store_true", help="instead, train the grids that `settings.CHOSEN` is from")
    parser.add_argument(
        "--page-only", action="store_true", help="train nothing; write the page from OUT's own CSV files"
    )
    parser.add_argument("--list", action="store_true", help="only say what would be trained, and how long that takes")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for downloads and trainings (data)")
    parser.add_argument(
        "--out", type=Path, help="folder for reproduction.md and reproduction/ (DATA/reproduce, or its quick/)"
    )
    return parser


def _work(args: argparse.Namespace, progress: Progress) -> None:
    place = Place(args.data, args.quick)
    out = args.out or (place.own / "quick" if args.quick else place.own)
    chosen = [figure for figure in FIGURES if not args.figure or figure.key in args.figure]
    if args.list:
        runs = search.runs_of(place) if args.search else runner.runs_of(chosen, place)
        for line in runner.inventory(runs, place):
            progress.say(line)
    elif args.page_only:
        page.write(out, results.read(out / "reproduction"), quick=args.quick)
    else:
        with exclusive(place.own):
            if args.search:
                search.search(place, out / page.NAME / search.NAME, progress)
            else:
                _reproduce(chosen, place, out, progress)


def _reproduce(chosen: Sequence[Figure], place: Place, out: Path, progress: Progress) -> None:
    runs = runner.runs_of(chosen, place)
    runner.prepare(place, {run.cell.task for run in runs}, progress)
    failed = runner.train(runs, place, progress)
    evaluated = _evaluated(chosen)
    runner.evaluate([run for run in runs if run.cell in evaluated and run not in failed], place, progress)
    everything = [(run.cell, run.seed, run.arm) for run in runner.runs_of(FIGURES, place)]
    results.write(out / "reproduction", everything, _drawn())
    page.write(out, results.read(out / "reproduction"), quick=place.quick)
    progress.say(f"figures, numbers and verdicts: {out / 'reproduction.md'}")
    if failed:
        raise StepError(f"{len(failed)} of {len(runs)} trainings failed (above); run again to try those once more")


def _evaluated(figures: Sequence[Figure]) -> set[Cell]:
    """Cells that are asked for more than their trainings say."""
    panels = [panel for figure in figures for panel in figure.panels if isinstance(panel, Numbers)]
    return {cell for panel in panels for _, cell, metric in panel.rows if metric in results.EVALUATED}


def _drawn() -> set[tuple[Cell, str]]:
    """Cells and metrics whose curves are drawn."""
    panels = [panel for figure in FIGURES for panel in figure.panels if isinstance(panel, Curves)]
    return {(cell, panel.metric) for panel in panels for cell in panel.lines.values()}


if __name__ == "__main__":
    sys.exit(main())
