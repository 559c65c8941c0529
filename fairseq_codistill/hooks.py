"""Where the criterion hooks into fairseq: the task instance, the optimiser's groups, the end of training.

fairseq hands its update counter only to `task.train_step`, asks the task instance for what a checkpoint shall hold,
and has no end-of-training hook: that every worker tells its log "done training", shown or not, is the sign. A process
that ends without it, or by `--stop-time-hours`, leaves its last snapshot not marked final.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Optional

from fairseq.distributed import DistributedTimeoutWrapper, LegacyDistributedDataParallel, ModuleProxyWrapper
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from codistill import CodistillConfig, Codistiller, ConfigError, ExchangeFailed, WeightDecay, shard, spare_loaders
from fairseq_codistill.architectures import architecture, build_unlike
from fairseq_codistill.average import Average
from fairseq_codistill.sampling import TrainingData, end_loaders

_WRAPPERS = (DistributedTimeoutWrapper, ModuleProxyWrapper, DistributedDataParallel, LegacyDistributedDataParallel)
_STATE = "codistill"
_host_copy = PathManager.copy


class TaskHooks:
    """Wraps the task instance's `train_step`, `begin_epoch` and checkpoint methods, and has checkpoints copied whole.

    Attributes:
        codistiller: made at the first update; None before.
        update: updates done so far, by fairseq's counter.
        epoch: fairseq's epoch, from 1.
        dummy: the batch at hand only keeps this worker in step; its loss is multiplied by 0.
    """

    def __init__(self, task: Any, config: CodistillConfig, root: Any) -> None:
        """Take the place of the methods on `task`; `root` is fairseq's whole configuration.

        Raises:
            ConfigError: the task's data options do not go with the exchange.
        """
        self.codistiller: Optional[Codistiller] = None
        self.update = 0
        self.epoch = 1
        self.dummy = False
        self._task, self._config, self._root = task, config, root
        if config.peers > 1:
            spare_loaders()
        PathManager.copy = staticmethod(_copy_whole)
        schedule = config.weight_decay_schedule()
        self._weight_decay = WeightDecay(schedule) if schedule is not None else None
        self._restored: Optional[dict[str, Any]] = None
        self._checkpoint_under_way = False
        if hasattr(task, "data_options"):  # codistill_translation, which loads the training set later
            task.shard = shard(task.data_options, config)
        self._data = TrainingData(task, root) if config.coordinated else None
        self._average = Average(task) if config.publish == "ema" else None
        self._host_train_step = task.train_step
        self._host_begin_epoch = task.begin_epoch
        self._host_get = getattr(task, "get_checkpoint_dict", dict)
        self._host_set = getattr(task, "set_checkpoint_dict", None)
        task.train_step = self._train_step
        task.begin_epoch = self._begin_epoch
        task.get_checkpoint_dict = self._get_checkpoint_dict
        task.set_checkpoint_dict = self._set_checkpoint_dict

    @property
    def coordinated(self) -> bool:
        """Whether all peers go through the same batches in step."""
        return self._data is not None

    def _train_step(
        self,
        sample: Any,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **extra: Any,
    ) -> Any:
        self.update, self.dummy = update_num, ignore_grad
        if self._average is not None:
            self._average.ask(update_num)
            extra = self._average.take(extra)
        with _ended_by_one_line():
            self._begin_update(model, optimizer)
            self._begin_batch()
        return self._host_train_step(
            sample=sample,
            model=model,
            criterion=criterion,
            optimizer=optimizer,
            update_num=update_num,
            ignore_grad=ignore_grad,
            **extra,
        )

    def _begin_update(self, model: nn.Module, optimizer: Any) -> None:
        if self.codistiller is None:
            self.codistiller = self._build(_unwrapped(model))
        if self._checkpoint_under_way:  # fairseq goes on training only when it is written
            self._checkpoint_under_way = False
            self.codistiller.checkpoint_saved(self.update)
        self.codistiller.begin_update(self.update, self.epoch)
        if self._weight_decay is not None:
            self._decay(self._weight_decay, list(optimizer.param_groups))  # of `--optimizer composite` a generator
        for key, value in self.codistiller.metrics().items():
            if key not in ("loss", "agreement"):  # these come from the logging outputs of all workers
                metrics.log_scalar(f"codistill_{key}", value, weight=0, priority=1500, round=6)

    def _decay(self, schedule: WeightDecay, groups: list[dict[str, Any]]) -> None:
        if schedule.decaying is None and not any(group.get("weight_decay") for group in groups):
            # With --reset-dataloader fairseq keeps our state from us, and the schedule may have come to 0 before.
            given = getattr(self._root.optimizer, "weight_decay", 0.0) != 0
            schedule.decaying = [given] * len(groups)
        schedule.apply(groups, self.update, self.epoch - 1)

    def _begin_batch(self) -> None:
        if self._data is None or self.codistiller is None:
            return
        target = self.codistiller.begin_batch(self._data.next_position())
        if target is not None:
            self._data.go_on_at(target)

    def _build(self, model: nn.Module) -> Codistiller:
        if self._task.target_dictionary is None:
            raise ConfigError(
                f"task {type(self._task).__name__} has no target dictionary: --criterion codistill compares "
                "predictions over one; use a task such as translation or language_modeling"
            )
        average = self._average
        codistiller = Codistiller(
            self._config,
            model=model,
            build_peer=lambda: self._build_peer(model),
            fingerprint=fingerprint(self._task.target_dictionary),
            save_dir=Path(self._root.checkpoint.save_dir),
            architecture=architecture(self._root.model),
            build_unlike=lambda name, arguments: build_unlike(name, arguments, self._task, self._root),
            place=lambda module: _placed(module, model),
            published_state=None if average is None else lambda: average.state(model),
        )
        if self._restored is not None:
            codistiller.load_state_dict(self._restored)
        Finalize(None, codistiller.close, exitpriority=10)  # unlike atexit also where fairseq spawned the process
        _when_done(self._finish)
        return codistiller

    def _finish(self, out_of_time: bool) -> None:
        if self.codistiller is None:
            return
        updates = self._updates_done()
        if out_of_time and updates < (self._root.optimization.max_update or math.inf):
            self.codistiller.close()  # more is to come: nothing is final yet
            return
        with _ended_by_one_line():
            self.codistiller.finish(updates)

    def _build_peer(self, model: nn.Module) -> nn.Module:
        """A module like ours. On a copy of the task: building a model may set the task's generator (`--eval-bleu`)."""
        return _placed(copy.copy(self._task).build_model(self._root.model), model)

    def _begin_epoch(self, epoch: int, model: nn.Module) -> Any:
        self.epoch = epoch
        if self._average is not None:
            self._average.ask(self._updates_done())
        return self._host_begin_epoch(epoch, model)

    def _get_checkpoint_dict(self) -> dict[str, Any]:
        """What fairseq merges into `extra_state`: ours beside the task's own, under the task's class name."""
        host: dict[str, Any] = self._host_get()
        if self.codistiller is None:
            return host
        name = type(self._task).__name__
        state = self.codistiller.state_dict()
        if self._weight_decay is not None:
            state["decaying"] = self._weight_decay.decaying
        checkpoint = self._root.checkpoint
        self._checkpoint_under_way = not (checkpoint.no_last_checkpoints or checkpoint.write_checkpoints_asynchronously)
        return {**host, name: {**host.get(name, {}), _STATE: state}}

    def _set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        self._restored = state.get(_STATE)
        if self._weight_decay is not None and self._restored is not None:
            self._weight_decay.decaying = self._restored.get("decaying")
        if self._host_set is not None:
            self._host_set({key: value for key, value in state.items() if key != _STATE})

    def _updates_done(self) -> int:
        """By the trainer's own word in fairseq's log."""
        # The aggregator that still is active: the one kept under the name "default" is replaced by a resume.
        counters = [found["num_updates"].val for found in metrics.get_active_aggregators() if "num_updates" in found]
        return max((int(value) for value in counters if value is not None), default=self.update)


def fingerprint(dictionary: Any) -> str:
    """sha256 (hex) of a fairseq dictionary: its symbols in the order of the model's classes."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest()


def _copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
    """In place of fairseq's copying onto `checkpoint_last.pt`, of which a kill would leave half to resume from."""
    if not PathManager.supports_rename(dst_path):
        return _host_copy(src_path, dst_path, overwrite)
    copied = _host_copy(src_path, f"{dst_path}.tmp", overwrite)
    PathManager.rename(f"{dst_path}.tmp", dst_path)
    return copied


def _when_done(act: Callable[[bool], None]) -> None:
    """Have `act` called once, when fairseq-train tells its log that training is done: with whether time was up.

    The record would be no sign: fairseq has the logs of all workers but the first make none of level INFO.
    """
    log = logging.getLogger("fairseq_cli.train")
    host_info = log.info
    out_of_time = False

    def info(message: Any, *arguments: Any, **how: Any) -> None:
        nonlocal out_of_time
        said = message if isinstance(message, str) else ""
        out_of_time |= said.startswith("Stopping training due to cumulative_training_time")
        if said.startswith("done training"):
            log.info = host_info  # type: ignore[method-assign]
            act(out_of_time)
        host_info(message, *arguments, **{**how, "stacklevel": how.get("stacklevel", 1) + 1})

    log.info = info  # type: ignore[assignment, method-assign]


@contextlib.contextmanager
def _ended_by_one_line() -> Iterator[None]:
    """End the process with what the run cannot be joined or go on for."""
    try:
        yield
    except (ConfigError, ExchangeFailed) as error:
        end_loaders()
        raise SystemExit(str(error)) from None


def _placed(module: nn.Module, model: nn.Module) -> nn.Module:
    parameter = next(model.parameters())
    return module.to(device=parameter.device, dtype=parameter.dtype)


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model
