"""How every demo ends at the terminal: status 0, or one line on stderr and status 1 (Ctrl-C and SIGTERM: 130)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from recipes.embedded.processes import ProcessFailed
from recipes.embedded.progress import Progress
from recipes.embedded.steps import StepError


def run(work: Callable[[Progress], None], name: str = "demo") -> int:
    """Do `work` and return the exit status; `name` is how the line on stderr begins."""
    progress = Progress()
    try:
        work(progress)
    except (StepError, ProcessFailed) as error:
        progress.say("")
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that cannot be written to, a full disk
        progress.say("")
        print(f"{name}: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        progress.say("")
        print(f"{name}: interrupted; what is finished is kept, run again to go on", file=sys.stderr)
        return 130
    return 0


def updates(text: str) -> int:
    """An argparse type: a number of updates."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number
