"""Steps that are done once: a folder built from settings, with a mark written last.

A folder whose mark carries the digest of the same settings is reused. Any other folder, an interrupted one among them,
is emptied and built again. `exclusive` keeps two runs out of one working folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any

MARK = "done.json"


class StepError(RuntimeError):
    """A step cannot be done; the message is one line for the person at the terminal."""


def later(default: Any) -> Any:
    """A field that settings got when something had been built from them already; see `plain`."""
    return field(default=default, metadata={"later": True})


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as a dict, without `later` fields at their default: digests of older ones still hold."""
    unchanged = {f.name for f in fields(settings) if f.metadata.get("later") and getattr(settings, f.name) == f.default}
    return {name: value for name, value in asdict(settings).items() if name not in unchanged}


def digest(settings: Any) -> str:
    """Sixteen hex digits that change whenever `settings` (plain JSON types) change."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(folder: Path, settings: Any) -> dict[str, Any] | None:
    """Return the facts noted by a finished build of `folder` from the same settings, or None."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(mark, dict) or mark.get("digest") != digest(settings):
        return None
    facts = mark.get("facts")
    return facts if isinstance(facts, dict) else None


def step(folder: Path, settings: Any, build: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Reuse `folder` if it was finished with these settings, else build it from nothing.

    Args:
        folder: belongs to this step alone; everything in it is removed before a build.
        settings: plain JSON types; what the contents depend on.
        build: fills the (empty) folder and returns facts worth keeping (plain JSON types).

    Returns:
        The facts of the build, as read back on reuse.
    """
    facts = finished(folder, settings)
    if facts is not None:
        return facts
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark = {"digest": digest(settings), "settings": settings, "facts": dict(build(folder))}
    partial = folder / (MARK + ".partial")
    partial.write_text(json.dumps(mark, indent=1), encoding="utf-8")
    os.replace(partial, folder / MARK)
    return dict(mark["facts"])


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process and the children it starts through `processes.run_all`.

    The lock goes with the last of them, however it ends: what a killed run left running still keeps the next one out.

    Raises:
        StepError: somebody else holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StepError(f"another run is working in {folder}: wait for it, or name another folder") from error
        os.set_inheritable(lock.fileno(), True)
        yield
