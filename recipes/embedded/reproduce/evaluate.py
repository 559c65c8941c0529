"""What finished models predict, alone, as an ensemble, and with the mean of their weights; run as a process of its own.

    python -m recipes.embedded.reproduce.evaluate {vision,nmt} DATA FOLDER...

DATA is the folder of images or the corpus, a FOLDER one arm's, whose `evaluation.json` appears whole or not at all.
timm and fairseq build and load the models: the last checkpoint of images, the best one of translations.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from recipes.embedded.reproduce.results import EVALUATION

Batches = list[tuple[Tensor, Tensor]]
BITS = 0.6931471805599453


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.embedded.reproduce.evaluate")
    parser.add_argument("task", choices=("vision", "nmt"))
    parser.add_argument("data", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    judge: Vision | Translation = Vision(args.data) if args.task == "vision" else Translation(args.data)
    with torch.no_grad():
        for folder in args.folders:
            found = judge(sorted(folder.glob("model-*")))
            unfinished = folder / f"{EVALUATION}.partial"
            unfinished.write_text(json.dumps(found), encoding="utf-8")
            os.replace(unfinished, folder / EVALUATION)
            print(folder, flush=True)
    return 0


class Vision:
    """Judges timm's models on the validation images."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._batches: dict[str, Batches] = {}

    def __call__(self, save_dirs: Sequence[Path]) -> dict[str, Any]:
        models = [self._load(folder) for folder in save_dirs]
        logits = [self._logits(model) for model in models]
        found: dict[str, Any] = {"models": [self._score(own.softmax(-1)) for own in logits]}
        for own, score in zip(logits, found["models"], strict=True):
            score["predictions"] = own.argmax(-1).tolist()
        if len(models) > 1:
            found["ensemble"] = self._score(torch.stack(logits).softmax(-1).mean(0))
            found["averaged"] = self._measured_again(_averaged(models))
            for model, score in zip(models, found["models"], strict=True):
                score["again_top1"] = self._measured_again(model)["top1"]  # what the averaged one compares with
        return found

    def _load(self, folder: Path) -> nn.Module:
        from timm.data import resolve_data_config
        from timm.models import create_model, load_checkpoint

        args = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
        model = create_model(args["model"], num_classes=args["num_classes"], **args["model_kwargs"])
        self._config = resolve_data_config(args, model=model)
        load_checkpoint(model, str(folder / "last.pth.tar"), use_ema=False)
        return model.eval()

    def _images(self, split: str) -> Batches:
        """Whole scans of a split, in a fixed order."""
        from timm.data import create_dataset, create_loader

        if split not in self._batches:
            dataset = create_dataset("", root=str(self._data), split=split)
            same = {name: self._config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct")}
            device = torch.device("cpu")
            loader = create_loader(dataset, batch_size=64, num_workers=0, use_prefetcher=False, device=device, **same)
            self._batches[split] = list(loader)
        return self._batches[split]

    def _logits(self, model: nn.Module) -> Tensor:
        return torch.cat([model(images) for images, _ in self._images("validation")])

    def _score(self, probabilities: Tensor) -> dict[str, Any]:
        labels = torch.cat([labels for _, labels in self._images("validation")])
        return {"top1": 100 * (probabilities.argmax(-1) == labels).double().mean().item()}

    def _measured_again(self, model: nn.Module) -> dict[str, Any]:
        """The score with BatchNorm's statistics from whole training scans: two models' say nothing of their mean's."""
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
        model.train()
        for images, _ in self._images("train"):
            model(images)
        model.eval()
        return self._score(self._logits(model).softmax(-1))


class Translation:
    """Judges fairseq's models on the next subword of the references."""

    def __init__(self, data: Path) -> None:
        from fairseq import utils

        from recipes.embedded.nmt.arms import user_dir

        utils.import_user_module(argparse.Namespace(user_dir=user_dir()))
        self._data = data / "bin"
        self._batches: dict[str, list[dict[str, Any]]] = {}

    def __call__(self, save_dirs: Sequence[Path]) -> dict[str, Any]:
        from fairseq.checkpoint_utils import load_model_ensemble_and_task

        paths = [str(folder / "checkpoint_best.pt") for folder in save_dirs]
        models, _, task = load_model_ensemble_and_task(paths, arg_overrides={"data": str(self._data)})
        for model in models:
            model.eval()
        if not self._batches:
            self._batches = {split: _sentences(task, split) for split in ("valid", "train")}
        found: dict[str, Any] = {"models": [self._alone(model) for model in models]}
        if len(models) > 1:
            found["ensemble"] = {"nll": self._nll(models, "valid")}
            found["averaged"] = {"nll": self._nll([_averaged(models)], "valid")}
        return found

    def _alone(self, model: nn.Module) -> dict[str, Any]:
        likely = [p.argmax(-1) for p, _ in self._positions([model], "valid")]
        numbers = {"nll": self._nll([model], "valid"), "clean_train_nll": self._nll([model], "train")}
        return {**numbers, "predictions": torch.cat(likely).tolist()}

    def _nll(self, models: Sequence[nn.Module], split: str) -> float:
        """Mean over the subwords of a split, in bits."""
        total, count = 0.0, 0
        for probabilities, targets in self._positions(models, split):
            total -= probabilities.gather(-1, targets[:, None]).log().sum().item()
            count += len(targets)
        return total / count / BITS

    def _positions(self, models: Sequence[nn.Module], split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Probabilities (subwords, dictionary) and targets (subwords,) of each batch, padding left out."""
        for sample in self._batches[split]:
            outputs = [model.get_normalized_probs(model(**sample["net_input"]), log_probs=False) for model in models]
            kept = sample["target"] != models[0].decoder.dictionary.pad()
            yield torch.stack([output.double() for output in outputs]).mean(0)[kept], sample["target"][kept]


def _sentences(task: Any, split: str) -> list[dict[str, Any]]:
    task.load_dataset(split)
    iterator = task.get_batch_iterator(task.dataset(split), max_tokens=4000, ignore_invalid_inputs=True)
    return list(iterator.next_epoch_itr(shuffle=False))


def _averaged(models: Sequence[nn.Module]) -> nn.Module:
    """One model with the mean of their weights and of the rest of their states."""
    mean = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, value in mean.state_dict().items():
        value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return mean


if __name__ == "__main__":
    sys.exit(main())
