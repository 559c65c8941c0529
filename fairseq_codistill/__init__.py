"""Codistillation as a fairseq user dir: `--user-dir "$(codistill user-dir fairseq)" --criterion codistill`.

Importing registers the criterion `codistill` and the task `codistill_translation`, and tells torch which plain types
fairseq's own checkpoints contain, so that torch 2.6 and later load them with `weights_only` left on.
"""

import argparse

import numpy
import torch

from fairseq_codistill import criterion, task  # noqa: F401  (importing is registering)

torch.serialization.add_safe_globals(
    [
        argparse.Namespace,  # the generation arguments of a model configuration
        numpy.float64().__reduce__()[0],  # numbers that numpy computed, among fairseq's meters (`--eval-bleu`)
        numpy.dtype,
        *(type(numpy.dtype(kind)) for kind in ("float64", "float32", "int64")),
    ]
)
