"""A digest of what a model's outputs mean, by which peers notice that they do not mean the same.

For trainings of one's own; the plug-ins take it from the host's dictionary or class list. Nothing here fails but on
what JSON cannot say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Union


def fingerprint(classes: Union[int, Sequence[str]]) -> str:
    """What `Codistiller` wants to know of the output space.

    Args:
        classes: their names, in the order of the logits; without names, how many there are.

    Returns:
        A sha256, hex.
    """
    meaning = classes if isinstance(classes, int) else list(classes)
    return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
