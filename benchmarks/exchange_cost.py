"""What does an exchange cost the training, on its thread and in the background?

Held: with a Transformer of 10 MB to 1 GB a boundary is passed whose snapshot has come before, nothing else running.
`Publisher.publish` and `Uptake.take_up` are timed as the training thread calls them, beside a plain copy of as many
bytes between two buffers that are there already: what bounds them. The others write into folders on the same disk.

    ours                       atomic; sha256 and finiteness verified by who reads; no pickle; not synced to the disk
    torch.save + os.replace    atomic; unverified; a pickle, read in its restricted form; not synced to the disk
    DCP async_save, no_dist    atomic by its metadata file; unverified; pickles; synced to the disk in the background

Background: see `benchmarks.exchange_background`. The first exchange of a run also allocates the buffer and builds the
peer's module; it is left out of the ratios and told in the details.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks import drawing, exchange_background
from benchmarks.exchange_setting import SHAPES, Scene, Shape, scene, seconds, timed
from benchmarks.record import Row, available_memory
from codistill.exchange.checkpoint.uptake import Uptake
from codistill.exchange.publisher import Publisher

TOLERANCE = 0.35
SIZES = (10, 100, 300, 1000)
ROUNDS = {10: 9, 100: 9, 300: 7, 1000: 5}
BEYOND = 0.020  # seconds that the training thread may be held beyond a copy
MEMORY = 10  # times the model, with what the page cache should keep
Found = dict[str, list[float]]


def measure(device: str) -> Iterator[Row]:
    for megabytes in SIZES:
        if available_memory() < MEMORY * megabytes * 10**6:
            print(f"  {megabytes} MB: left out, too little memory is free", file=sys.stderr)
            continue
        yield from held(SHAPES[megabytes], device)
    yield from exchange_background.measure(device)


def held(shape: Shape, device: str) -> Iterator[Row]:
    """What holds the training thread, for one size."""
    with timed(Publisher, "publish") as out, timed(Uptake, "take_up") as back, scene(shape, device) as here:
        first = {"first_ms": {"publish": milliseconds(out[-1:]), "take up": milliseconds(back[-1:])}}
        found = rounds(here, ROUNDS[shape.megabytes], out, back)
    name, nbytes = f"{shape.megabytes} MB", here.nbytes
    for what, copy in (("publish", "copy out"), ("take up", "copy in")):
        ratios = [ours / (plain + BEYOND) for ours, plain in zip(found[what], found[copy], strict=True)]
        beyond = [ours - plain for ours, plain in zip(found[what], found[copy], strict=True)]
        yield Row.of(
            f"{name}: {what}, held / (copy + {1000 * BEYOND:.0f} ms)",
            ratios,
            goal=1.0,
            details={
                "held_ms": milliseconds(found[what]),
                "copy_ms": milliseconds(found[copy]),
                "beyond_ms": milliseconds(beyond),
                "worst_beyond_ms": milliseconds([max(beyond)]),
                "copy_GB_per_s": round(nbytes / median(found[copy]) / 1e9, 2),
                "rest_of_boundary_ms": milliseconds(found["rest"]),
                "background_cpu_ms": milliseconds(found[f"{what}, background"]),
            }
            | first,
        )
    yield whole(name, found)
    for what, contenders in (("publish", ("torch.save", "DCP async_save")), ("take up", ("torch.load", "DCP load"))):
        for theirs in contenders:
            ratios = [ours / other for ours, other in zip(found[what], found[theirs], strict=True)]
            details = {"ours_ms": milliseconds(found[what]), "theirs_ms": milliseconds(found[theirs])}
            yield Row.of(f"{name}: {what}, held, of {theirs}", ratios, details=details)


def whole(name: str, found: Found) -> Row:
    """A boundary from beginning to end: both halves, and what is beside them."""
    held = [sum(parts) for parts in zip(found["publish"], found["take up"], found["rest"], strict=True)]
    copies = [sum(parts) for parts in zip(found["copy out"], found["copy in"], strict=True)]
    ratios = [ours / (plain + BEYOND) for ours, plain in zip(held, copies, strict=True)]
    details = {"held_ms": milliseconds(held), "copies_ms": milliseconds(copies)}
    return Row.of(f"{name}: whole boundary, held / (both copies + {1000 * BEYOND:.0f} ms)", ratios, details=details)


def rounds(here: Scene, count: int, out: list[float], back: list[float]) -> Found:
    """Seconds of everything in each round; who goes first rotates."""
    found: Found = defaultdict(list)
    plain = copies(here.nbytes, next(here.model.parameters()).device)
    contenders = Contenders(here)
    actions: list[Callable[[Found], None]] = [
        lambda found: ours(here, plain, out, back, found),
        contenders.plain_file,
        contenders.distributed,
    ]
    for number in range(-1, count):
        into: Found = found if number >= 0 else defaultdict(list)  # once to warm up
        for turn in range(len(actions)):
            actions[(number + turn) % len(actions)](into)
    contenders.close()
    return found


def ours(here: Scene, plain: dict[str, Callable[[], None]], out: list[float], back: list[float], found: Found) -> None:
    """One exchange, each half beside a plain copy of as many bytes."""
    here.elsewhere.prepare()
    found["take up, background"].append(here.fetched(here.elsewhere.announce))
    for name, copy in plain.items():
        found[name].append(seconds(copy))
    boundary: list[float] = []
    found["publish, background"].append(here.published(lambda: boundary.append(seconds(here.exchange))))
    here.require_uptake()
    found["publish"].append(out[-1])
    found["take up"].append(back[-1])
    found["rest"].append(boundary[0] - out[-1] - back[-1])


def copies(nbytes: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """A plain copy of so many bytes out of the device and one in, between buffers that are there already."""
    there = torch.ones(nbytes, dtype=torch.uint8, device=device)
    buffer = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    loaded = torch.ones(nbytes, dtype=torch.uint8)
    return {"copy out": lambda: _copied(buffer, there), "copy in": lambda: _copied(there, loaded)}


def _copied(to: torch.Tensor, of: torch.Tensor) -> None:
    to.copy_(of)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Contenders:
    """What else brings weights from one job to another through a folder, for a training that it holds."""

    def __init__(self, here: Scene) -> None:
        self._here, self._number = here, 0
        # Kept, so that its host buffer is allocated once, as ours is; and pinned where ours is.
        cuda = next(here.model.parameters()).is_cuda
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
            )
        )

    def plain_file(self, found: Found) -> None:
        """torch.save, renamed when it is whole; read through a map, as our snapshots are."""
        path, unfinished = self._here.folder / "weights.pt", self._here.folder / "weights.tmp"

        def save() -> None:
            torch.save(self._here.model.state_dict(), unfinished)
            os.replace(unfinished, path)

        found["torch.save"].append(seconds(save))
        found["torch.load"].append(
            seconds(lambda: self._here.other.load_state_dict(torch.load(path, mmap=True, weights_only=True)))
        )
        path.unlink()

    def distributed(self, found: Found) -> None:
        """torch.distributed.checkpoint for a single process."""
        self._number += 1
        path, saving = self._here.folder / f"dcp{self._number}", []
        save: dict[str, Any] = {"checkpoint_id": path, "async_stager": self._stager, "no_dist": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = self._here.model.state_dict()
            found["DCP async_save"].append(seconds(lambda: saving.append(dcp.async_save(state, **save))))
            saving[0].result()
            state = self._here.other.state_dict()
            found["DCP load"].append(seconds(lambda: dcp.load(state, checkpoint_id=path, no_dist=True)))
        shutil.rmtree(path)

    def close(self) -> None:
        self._stager.close()


def milliseconds(times: Sequence[float]) -> float:
    return round(1000 * median(times), 1)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """How long the training thread is held, by size, and a curve of update times."""
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, what in zip(axes, ("publish", "take up"), strict=True):
        for label, (style, points) in _curves(rows, what).items():
            axis.plot(*zip(*points, strict=True), style, color="black", label=label, markersize=5)
        axis.set(title=what, xlabel="MB", xscale="log", yscale="log")
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.minorticks_off()
        axis.grid(color="0.9")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("training thread held, ms")
    figure.savefig(folder / "exchange-held.png", dpi=120)
    pyplot.close(figure)
    exchange_background.draw(rows, folder)


def _curves(rows: Sequence[Row], what: str) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """By label, a style and the points (MB, ms)."""
    found: dict[str, tuple[str, list[tuple[int, float]]]] = {}
    styles = iter(("^:", "D--"))
    for row in rows:
        size, _, name = row.name.partition(f" MB: {what}, held")
        if name.startswith(" / "):
            found.setdefault("ours", ("o-", []))[1].append((int(size), row.details["held_ms"]))
            found.setdefault("a plain copy", ("s-.", []))[1].append((int(size), row.details["copy_ms"]))
        elif name:
            label = name.removeprefix(", of ")
            if label not in found:
                found[label] = (next(styles), [])
            found[label][1].append((int(size), row.details["theirs_ms"]))
    return found
