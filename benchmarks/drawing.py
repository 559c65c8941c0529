"""matplotlib as the benchmarks' pictures want it: no window, and no log of its own."""

from __future__ import annotations

import logging
from types import ModuleType


def pyplot() -> ModuleType:
    """matplotlib's pyplot, imported only when something is drawn."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # fairseq has the root logger tell everything
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
