"""scikit-learn's digits (1,797 real scans, inside its wheel) as an ImageFolder, the layout that timm reads.

`train/` and `validation/` hold one folder a class; which scan is where depends on nothing but the seed. A finished
folder is reused.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy
from PIL import Image
from sklearn.datasets import load_digits

from recipes.embedded.vision.settings import VALIDATION

SEED = 0


def write_digits(folder: Path, size: int = 16, validation: int = VALIDATION) -> Path:
    """Write the digits as PNG images of `size` × `size` pixels below `folder`; returns it.

    Args:
        folder: appears whole or not at all.
        size: the scans have 8 × 8 pixels, and are enlarged without smoothing.
        validation: how many of the 1,797 are kept to validate.
    """
    if folder.exists():
        return folder
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    scans, labels = load_digits(return_X_y=True)
    order = numpy.random.default_rng(SEED).permutation(len(labels))
    for place, index in enumerate(order):
        split = "validation" if place < validation else "train"
        target = unfinished / split / str(labels[index])
        target.mkdir(parents=True, exist_ok=True)
        pixels = (scans[index].reshape(8, 8) * (255 / 16)).astype(numpy.uint8)
        Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(target / f"{index:04}.png")
    unfinished.rename(folder)
    return folder
