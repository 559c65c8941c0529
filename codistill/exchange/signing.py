"""The key that manifests are signed with, and the signature itself: HMAC-SHA256.

The key comes from the environment only, since flags end up in args.yaml, checkpoints and experiment trackers. Whoever
has it can write for every peer of the run; whoever has not cannot make a reader take up anything. No message of ours
contains it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Optional

from codistill.config import ConfigError

KEY = "CODISTILL_KEY"
KEY_FILE = "CODISTILL_KEY_FILE"
LEAST = 16  # bytes
_MOST = 64 * 1024
_DOMAIN = b"codistill manifest\n"  # a signature made for something else is none for a manifest


def signing_key() -> Optional[bytes]:
    """The key in `CODISTILL_KEY`, or in the file that `CODISTILL_KEY_FILE` names; None when neither is set.

    White space around it does not count.

    Raises:
        ConfigError: both are set, the file cannot be read, or the key is too short to be one.
    """
    text, name = os.environ.get(KEY), os.environ.get(KEY_FILE)
    if text is not None and name is not None:
        raise ConfigError(f"{KEY} and {KEY_FILE} are both set; unset one of them")
    if name is not None:
        return _long_enough(_read(name), f"{KEY_FILE} {name}")
    return None if text is None else _long_enough(os.fsencode(text), KEY)


def sign(document: bytes, key: bytes) -> str:
    """The signature of `document`, 64 hex digits."""
    return hmac.new(key, _DOMAIN + document, hashlib.sha256).hexdigest()


def signed_by(document: bytes, signature: str, key: bytes) -> bool:
    """Whether `signature` is that of `document`; takes as long whatever it is."""
    return hmac.compare_digest(sign(document, key), signature)


def _read(name: str) -> bytes:
    try:
        with Path(name).expanduser().open("rb") as file:
            return file.read(_MOST)
    except OSError as error:
        raise ConfigError(f"{KEY_FILE} {name}: {error.strerror}; name a readable file that holds the key") from None


def _long_enough(key: bytes, source: str) -> bytes:
    key = key.strip()
    if len(key) < LEAST:
        raise ConfigError(
            f"{source}: a key of {len(key)} bytes; it must have {LEAST} or more, such as `openssl rand -hex 32` gives"
        )
    return key
