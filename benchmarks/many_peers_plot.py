"""The picture of `many_peers`: what a peer costs, and how stale it is, against the number of peers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import drawing

if TYPE_CHECKING:
    from benchmarks.many_peers import Measurement

STYLES = {"all": ("black", "o", "-"), "ring": ("0.55", "s", "--"), "random-2": ("0.3", "^", ":")}


def draw(found: Sequence[Measurement], interval_seconds: float, path: Path) -> None:
    pyplot = drawing.pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for topology, (colour, marker, line) in STYLES.items():
        rows = [row for row in found if row.topology == topology]
        peers = [row.peers for row in rows]
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
        axes[0].plot(peers, [row.requests / interval_seconds for row in rows], label=topology, **style)
        axes[1].plot(peers, [row.read / 1000 for row in rows], **style)
        axes[1].plot(peers, [row.snapshots / 1000 for row in rows], **style, alpha=0.35)
        axes[2].plot(peers, [row.age_mean for row in rows], **style)
        axes[2].plot(peers, [row.age_max for row in rows], **style, alpha=0.35)
    for axis, title in zip(
        axes,
        (
            "requests of a peer, per second",
            "kB read by a peer, per interval\n(pale: snapshots alone, 2 kB each)",
            "age of the weights in use, in intervals\n(mean; pale: maximum)",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
        axis.set_xlabel("peers")
        axis.grid(color="0.9")
    for axis, ticks in ((axes[0], (2, 5, 10, 20, 50)), (axes[1], (1, 10, 100, 1000))):
        axis.set_yscale("log")
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[2].set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
