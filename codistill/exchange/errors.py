"""What can go wrong between peers.

Nothing here ends a run by itself: the caller counts an error by its `cause`, logs its one line once, and trains on.
"""

from __future__ import annotations


class ExchangeError(Exception):
    """An exchange that failed: one line for a person (`str(e)`) and one stable word to count by (`e.cause`).

    Args:
        cause: The word, such as "hash" or "storage".
        message: What happened, to what, in one line and without credentials.
    """

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Refused(ExchangeError):
    """What was read (or is about to be written) is not acceptable; trying again brings the same.

    Causes: size, format, run, peer, signature, hash, names, shape, dtype, non-finite, fingerprint, init, architecture,
    rollback, terms, exists.
    """


def same_start(whom: str = "this peer") -> Refused:
    """The refusal of a peer that began with the weights of `whom`, so that they have nothing to tell each other."""
    return Refused(
        "init",
        f"it started from the same initial weights as {whom}; give each peer its own seed, or, if both start from one "
        "checkpoint, some weights of its own (a fresh head)",
    )


class StorageError(ExchangeError):
    """The store failed (cause "storage"); it may work later."""
