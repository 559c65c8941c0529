"""Whether processes that are not our children have ended (Linux)."""

import time
from collections.abc import Sequence
from pathlib import Path


def gone(process: int) -> bool:
    """Ended, at least as far as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def gone_soon(processes: Sequence[int], seconds: float = 60.0) -> list[bool]:
    """Which of them have ended when all have, or time is up."""
    end = time.monotonic() + seconds
    while not all(gone(process) for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    return [gone(process) for process in processes]
