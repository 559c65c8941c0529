"""`make bench`: what codistillation costs, and what others cost, as ratios measured within one run.

Each line shows what was measured, and the goal where there is one; missing it is no failure. With `--check` the ratios
are set beside those kept in docs/performance, and the status is 1 when one is worse than its question tolerates.
A question that is interrupted (Ctrl-C, SIGTERM) keeps nothing, and leaves no files.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from benchmarks import record

QUESTIONS = {
    "update": "update_cost",
    "memory": "memory",
    "exchange": "exchange_cost",
    "bytes": "bytes_per_update",
    "prediction": "prediction_cost",
    "links": "slow_links",
    "growth": "growth",
    "peers": "many_peers",
    "quality": "quality",
}
ON_A_GPU = ("update", "memory", "exchange", "growth")  # the others' trainings are on the CPU, whatever there is
KEPT = Path(__file__).resolve().parents[1] / "docs" / "performance"


def ask(question: str, device: str, out: Path) -> list[record.Row]:
    """Measure, show and keep the rows of a question."""
    module = importlib.import_module(f"benchmarks.{QUESTIONS[question]}")
    print(f"\n{question}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
    began, rows = time.monotonic(), []
    with apart():
        for row in module.measure(device):
            rows.append(row)
            print(f"  {row.line()}", flush=True)
    path = record.path_of(out, question, device)
    record.write(path, question, rows, device)
    if hasattr(module, "draw"):
        module.draw(rows, out)
    print(f"  {(time.monotonic() - began) / 60:.1f} min; kept in {path}", flush=True)
    return rows


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Leave nothing to the next question: no temporary files, of killed processes either, no number of threads."""
    threads = torch.get_num_threads()
    with (
        tempfile.TemporaryDirectory(prefix="codistill-bench-", ignore_cleanup_errors=True) as folder,
        mock.patch.dict(os.environ, TMPDIR=folder),
        mock.patch.object(tempfile, "tempdir", folder),
    ):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check(question: str, device: str, rows: list[record.Row]) -> bool:
    """Compare with the kept rows; whether all hold."""
    path = record.path_of(KEPT, question, device)
    if not path.exists():
        print(f"  nothing to compare with: {path} does not exist")
        return True
    tolerance = importlib.import_module(f"benchmarks.{QUESTIONS[question]}").TOLERANCE
    verdicts = list(record.compare(record.read(path), rows, tolerance))
    for holds, line in verdicts:
        print(f"  {'ok  ' if holds else 'FAIL'} {line}")
    return all(holds for holds, _ in verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="*", help=f"some of {', '.join(QUESTIONS)}; all without it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where models are trained (cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("data/bench"), help="folder for JSON and pictures (data/bench)"
    )
    parser.add_argument("--check", action="store_true", help="compare the ratios with those kept in docs/performance")
    args = parser.parse_args()
    unknown = sorted(set(args.question) - set(QUESTIONS))
    if unknown:
        parser.error(f"{unknown[0]}: not one of {', '.join(QUESTIONS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU here; measuring on the CPU", file=sys.stderr)
        args.device = "cpu"
    if args.device == "cuda" and (elsewhere := [one for one in args.question if one not in ON_A_GPU]):
        parser.error(f"{elsewhere[0]}: with --device cuda one of {', '.join(ON_A_GPU)}; the others train on the CPU")
    if args.check and args.out.resolve() == KEPT:
        parser.error(f"--out {args.out}: --check compares with what is kept there; name another folder")
    logging.disable(logging.INFO)  # fairseq has the root logger tell everything
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {record.machine(args.device)['cpu']}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all that is open is closed
    holds = True
    for question in args.question or (QUESTIONS if args.device == "cpu" else ON_A_GPU):
        rows = ask(question, args.device, args.out)
        holds = (not args.check or check(question, args.device, rows)) and holds
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
