"""Codistillation for timm's train.py: flags on the script people already have.

`timm-codistill path/to/train.py …` runs an unmodified train.py of timm 1.0.27 to 1.0.31 with `--codistill-…` flags.
All peers are given the same `--seed`. Peer I trains as train.py does with `--seed` + 100,000 · I and, where several
workers share the data, with the same 100,000 · I as the seed of the distributed sampler, which timm leaves at 0; so
peer 0 trains as train.py itself. With exchange by prediction what makes the batches is seeded by
`--codistill-data-seed` instead, the same for all.

A train.py of one's own needs three lines instead, and a seed of its own for each peer:

    timm_codistill.add_arguments(parser)
    task = timm_codistill.CodistillationTask(model, loss_fn, options=args, device=device)  # for ClassificationTask
    for epoch in task.epochs(range(start_epoch, epochs), loader_train, optimizer, save_dir=output_dir):

and, for exchange by prediction, `task.batches(loader_train)` where it goes through the loader, and where it calls
timm's Mixup, `task.mixing(mixup_fn)`; for `--codistill-sync`, `task.remember_generators()` on every worker just before
a checkpoint is saved.

The names are looked up when first used: a checkout of timm brings its own package, and importing this one must not load
another timm before train.py's folder is on the path.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"CodistillationTask": "timm_codistill.task", "add_arguments": "timm_codistill.options"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
