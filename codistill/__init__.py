"""Codistillation for the training jobs people already run: the core that the fairseq and timm plug-ins share.

Models that train at the same time pull their predictions towards each other's, knowing their peers only through
snapshots of weights that arrive now and then. The public names are those below; they load torch when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Codistiller": "codistill.codistiller",
    "CodistillConfig": "codistill.config",
    "ConfigError": "codistill.config",
    "DataConfig": "codistill.config",
    "ExchangeFailed": "codistill.meters",
    "KEYS": "codistill.meters",
    "Piecewise": "codistill.schedules",
    "Position": "codistill.exchange.protocol",
    "WeightDecay": "codistill.weight_decay",
    "fingerprint": "codistill.output_space",
    "flag": "codistill.config",
    "kept_items": "codistill.data",
    "shard": "codistill.data",
    "spare_loaders": "codistill.loader_processes",
    "untouched_generators": "codistill.random_state",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
