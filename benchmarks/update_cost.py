"""How long does a codistilled update take beside a plain one? (goal: at most 1.40 times, one peer, 4,000 classes)"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.transformer import Size, exchanging

PAIRS = 40


def seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure() -> Iterator[str]:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with exchanging(Size()) as ((training, codistiller), _):
            for _ in range(5):
                training.update()
                training.update(codistiller)
            pairs = [(seconds(training.update), seconds(lambda: training.update(codistiller))) for _ in range(PAIRS)]
        plain, codistilled = (statistics.median(times) for times in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        yield (
            f"{threads} thread(s): {1000 * plain:.1f} ms plain, {1000 * codistilled:.1f} ms codistilled; "
            f"ratio {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {PAIRS} pairs)"
        )
