"""Where a train.py of timm's is hooked into: module-level names that its `main` looks up when it runs.

Without `--codistill` nothing but the help text changes. A train.py that lacks the names is refused before it runs.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
from types import ModuleType
from typing import Any, Optional

from timm.utils import CheckpointSaver

from codistill import ConfigError, ExchangeFailed, shard
from timm_codistill.data import keep_fraction, seed_offset
from timm_codistill.options import add_arguments, codistill_config, data_config, refuse_host_options
from timm_codistill.task import CodistillationTask

SEAM = ("parser", "_parse_args", "main", "create_dataset", "create_loader", "ClassificationTask", "train_one_epoch")
ARGUMENTS = ("epoch", "loader", "optimizer", "args", "task")  # of train_one_epoch


def missing(source: str) -> list[str]:
    """What of the seam the text of a train.py lacks.

    Raises:
        SyntaxError: it is not Python.
    """
    names: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {name.asname or name.name: node for name in node.names}
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.Assign):
            names |= {name.id: node for name in node.targets if isinstance(name, ast.Name)}
    lacking = [name for name in SEAM if name not in names]
    taken = names.get("train_one_epoch")
    if isinstance(taken, list):
        lacking += [f"train_one_epoch(…, {name}, …)" for name in ARGUMENTS if name not in taken]
    return lacking


def run(module: ModuleType) -> None:
    """Run train.py's `main` with our flags.

    Raises:
        SystemExit: with one line, when an option is not allowed or, if so asked, after trouble with the exchange.
    """
    hooks = Hooks(module)
    try:
        module.main()
        hooks.end()
    except (ConfigError, ExchangeFailed) as error:
        raise SystemExit(str(error)) from None
    finally:
        hooks.close()


def _replace_at_once(saver: CheckpointSaver, src: str, dst: str) -> None:
    """In place of deleting `last.pth.tar` first: a kill in between would leave none to resume from."""
    os.replace(src, dst)


class Hooks:
    """Stands in place of names in the module of a train.py."""

    def __init__(self, module: ModuleType) -> None:
        """Add the flags; the other names are taken when the parsed arguments ask for it."""
        self._module = module
        self._task: Optional[CodistillationTask] = None
        self._updates_in_all: Optional[int] = None
        self._to_be_continued = False
        self._model_arguments: Optional[dict[str, Any]] = None
        self._host_parse_args = module._parse_args
        self._host_create_model = getattr(module, "create_model", None)
        self._host_create_dataset = module.create_dataset
        self._host_create_loader = module.create_loader
        self._host_train_one_epoch = module.train_one_epoch
        self._host_validate = getattr(module, "validate", None)
        add_arguments(module.parser)
        module._parse_args = self._parse_args  # type: ignore[attr-defined]

    def end(self) -> None:
        """`main` has returned: publish the final weights, unless it was stopped before the last update."""
        if self._task is None or self._to_be_continued:
            return
        if self._updates_in_all in (None, self._task.updates):
            self._task.finish()

    def close(self) -> None:
        """Stop what runs in the background."""
        if self._task is not None:
            self._task.close()

    def _parse_args(self) -> tuple[argparse.Namespace, str]:
        args, text = self._host_parse_args()
        config = codistill_config(args)
        if config is not None:
            refuse_host_options(args, config)
            self._data = data_config(args)
            self._shard = shard(self._data, config)
            self._coordinated = config.coordinated
            self._to_be_continued = getattr(args, "stop_epoch", None) is not None  # from timm 1.0.31
            args.seed += seed_offset(config.peer)  # not in `text`: args.yaml holds what the user gave
            self._take_places(args)
        return args, text

    def _take_places(self, args: argparse.Namespace) -> None:
        hooks = self

        class Task(CodistillationTask):
            """The task with this run's options."""

            def __init__(self, *arguments: Any, **kwargs: Any) -> None:
                super().__init__(*arguments, options=args, model_arguments=hooks._model_arguments, **kwargs)

        Task.__name__ = CodistillationTask.__name__
        CheckpointSaver._replace = _replace_at_once  # type: ignore[method-assign]
        self._module.ClassificationTask = Task  # type: ignore[attr-defined]
        self._module.create_dataset = self._create_dataset  # type: ignore[attr-defined]
        self._module.create_loader = self._create_loader  # type: ignore[attr-defined]
        self._module.train_one_epoch = self._train_one_epoch  # type: ignore[attr-defined]
        if self._host_create_model is not None:
            self._module.create_model = self._create_model  # type: ignore[attr-defined]
        if self._host_validate is not None:
            self._module.validate = self._validate  # type: ignore[attr-defined]

    def _create_model(self, *arguments: Any, **kwargs: Any) -> Any:
        self._model_arguments = {name: value for name, value in kwargs.items() if name != "model_name"}
        return self._host_create_model(*arguments, **kwargs)  # type: ignore[misc]

    def _create_dataset(self, *arguments: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_training"):
            return self._host_create_dataset(*arguments, **kwargs)
        dataset = self._host_create_dataset(*arguments, **self._seeded(kwargs, "seed"))
        keep_fraction(dataset, self._data, self._shard)
        return dataset

    def _create_loader(self, *arguments: Any, **kwargs: Any) -> Any:
        if kwargs.get("num_workers") == 0:  # up to timm 1.0.28 `--workers 0` asks torch for persistent workers
            kwargs.setdefault("persistent_workers", False)
        if self._coordinated and kwargs.get("is_training"):
            kwargs = {**self._seeded(kwargs, "batch_choice_seed"), "persistent_workers": False}
        return self._host_create_loader(*arguments, **kwargs)

    def _seeded(self, kwargs: dict[str, Any], name: str) -> dict[str, Any]:
        """`kwargs`, with the seed `name`, which came from `--seed`, the same for all peers if their batches are."""
        return {**kwargs, name: self._data.data_seed} if self._coordinated and name in kwargs else kwargs

    def _train_one_epoch(self, *arguments: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self._host_train_one_epoch).bind(*arguments, **kwargs)
        given = bound.arguments
        self._task = self._own(given["task"])
        self._updates_in_all = given.get("num_updates_total")
        self._task.begin_epoch(
            given["epoch"],
            given["loader"],
            given["optimizer"],
            save_dir=given.get("output_dir"),
            grad_accum_steps=given["args"].grad_accum_steps,
        )
        given["loader"] = self._task.batches(given["loader"])
        if given.get("mixup_fn") is not None:
            given["mixup_fn"] = self._task.mixing(given["mixup_fn"])
        metrics = self._host_train_one_epoch(*bound.args, **bound.kwargs)
        self._task.end_epoch()
        self._task.remember_generators()
        metrics.update(self._task.metrics())
        return metrics

    def _validate(self, *arguments: Any, **kwargs: Any) -> Any:
        metrics = self._host_validate(*arguments, **kwargs)  # type: ignore[misc]
        if self._task is not None:
            self._task.remember_generators()  # a loader draws a seed; checkpoints are written after this
        return metrics

    @staticmethod
    def _own(task: Any) -> CodistillationTask:
        if not isinstance(task, CodistillationTask):
            raise ConfigError(
                f"--codistill: train.py made a {type(task).__name__}, only plain classification can be codistilled; "
                "leave out the option that chooses another task, or --codistill"
            )
        return task
