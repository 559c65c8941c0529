"""What others wrote, made fit for a message of one line: a library's error, a name that came from the store.

Stands on the ground: everything may import it.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The start of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def printable(text: str) -> str:
    """`text` with a question mark for every character that could command a terminal, or is none."""
    return "".join(character if character.isprintable() else "?" for character in text)
