"""CodistillationTask, a sibling of timm's tasks: classification with a penalty for differing from the peers.

The model's `state_dict` holds nothing of ours; what a resume needs rides in the task state, as plain types. Without a
usable peer the task is timm's `ClassificationTask`, to the last bit.
"""

from __future__ import annotations

import argparse
import atexit
import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from timm.loss import JsdCrossEntropy
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from codistill import CodistillConfig, Codistiller, ConfigError, WeightDecay, flag, spare_loaders
from timm_codistill import architectures
from timm_codistill.coordinated import Sampling
from timm_codistill.data import fingerprint, offset_sampler, seed_offset
from timm_codistill.generators import Generators
from timm_codistill.options import codistill_config, data_config

_STATE = "codistill"


class CodistillationTask(ClassificationTask):
    """Supervised classification, and agreement with the peers of a run.

    The dict it returns has the `loss` and `output` of `ClassificationTask`. The gradient of `loss` has the penalty in
    it, alpha times the mean of D over the batch; its value is the host's own loss alone, so that whatever logs it, or
    schedules by it, does not notice the penalty. With `JsdCrossEntropy`, which compares only the first augmentation
    split with labels, the penalty covers that split.

    Args:
        model: The model to train.
        criterion: Loss function, as for `ClassificationTask`.
        options: Parsed arguments with the flags of `add_arguments`; without `--codistill` this is a
            `ClassificationTask`.
        model_arguments: What `timm.create_model` was given besides the name, for peers of another architecture; timm
            from 1.0.31 on remembers it.
        **kwargs: Passed on to `ClassificationTask`.

    Raises:
        ConfigError: When an option is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any = None,
        *args: Any,
        options: argparse.Namespace,
        model_arguments: Optional[Mapping[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, criterion, *args, **kwargs)
        self._config: Optional[CodistillConfig] = codistill_config(options)
        self._data_seed = data_config(options).data_seed if self._config else 0
        if self._config and self._config.peers > 1:
            spare_loaders()
        self._sampling: Optional[Sampling] = None
        self._architecture = architectures.describe(model, model_arguments)
        schedule = self._config.weight_decay_schedule() if self._config else None
        self._weight_decay = WeightDecay(schedule) if schedule is not None else None
        self._codistiller: Optional[Codistiller] = None
        self._generators: Optional[Generators] = None
        self._drawn: Optional[list[dict[str, Any]]] = None
        self._restored: dict[str, Any] = {}
        self._optimizer: Any = None
        self._compiled: Optional[dict[str, Any]] = None
        self._update, self._update_after, self._epoch = 0, 0, 1
        self._checkpoint_at: Optional[int] = None

    def epochs(
        self,
        epochs: Iterable[int],
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        save_dir: Optional[str | Path] = None,
        grad_accum_steps: int = 1,
    ) -> Iterator[int]:
        """Go through `epochs`; when they are done, publish the final weights. For a train.py of one's own.

        Args:
            epochs: Numbers from 0; after a resume the first is not 0.
            loader: Of the training set.
            optimizer: Whose groups get the scheduled weight decay.
            save_dir: Where worker 0 writes checkpoints; other workers need none.
            grad_accum_steps: Batches for each update.

        Yields:
            Each epoch.

        Raises:
            ConfigError: When the run cannot be joined with these options.
            ExchangeFailed: After trouble, with `--codistill-on-error fail`.
        """
        for epoch in epochs:
            self.begin_epoch(epoch, loader, optimizer, save_dir=save_dir, grad_accum_steps=grad_accum_steps)
            yield epoch
            self.end_epoch()
        self.finish()

    def begin_epoch(
        self,
        epoch: int,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        *,
        save_dir: Optional[str | Path],
        grad_accum_steps: int = 1,
    ) -> None:
        """Get ready for `epoch`, counted from 0; the arguments are those of `epochs`."""
        if self._config is None:
            return
        self._epoch, self._optimizer = epoch + 1, optimizer
        updates = -(-len(loader) // grad_accum_steps)
        self._update, self._update_after = epoch * updates, (epoch + 1) * updates  # as train.py counts, resumed or not
        seed = self._data_seed if self._config.coordinated else self._config.peer
        offset_sampler(loader, seed_offset(seed), epoch)
        if self._config.coordinated:
            if self._sampling is None:
                self._sampling = Sampling(self._data_seed, _rank(), self.device)
            self._sampling.begin_epoch(epoch + 1, grad_accum_steps)
        if self._codistiller is None:
            self._begin(self._config, loader.dataset, save_dir)

    def batches(self, loader: Any) -> Any:
        """What to go through in this epoch in place of `loader`: the same thing, unless all peers train in step.

        Raises:
            ConfigError: When all peers train in step and the loader's workers persist.
        """
        return loader if self._sampling is None else self._sampling.batches(loader)

    def mixing(self, mixup_fn: Any) -> Any:
        """What to call in place of timm's Mixup: the same thing, unless all peers train in step."""
        return mixup_fn if self._sampling is None else self._sampling.mixing(mixup_fn)

    def end_epoch(self) -> None:
        """All of an epoch's batches are done; those that were skipped to meet other peers count as updates."""
        if self._sampling is not None:
            self._update = self._update_after
        self._update_after = self._update  # the loader may have had fewer batches than it said

    def update_ema(self, step: Optional[int] = None) -> None:
        """Update the moving average as timm does; `step` is the number of updates done."""
        super().update_ema(step)
        self._update = self._update + 1 if step is None else step

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Forward pass, loss and penalty.

        Args:
            input: Images [B, C, H, W].
            target: Whatever the criterion takes.

        Returns:
            `loss` and `output`.
        """
        self._begin_update()
        if self._codistiller is not None:
            self._codistiller.predict_early(lambda peer: self._predicted(peer, input))
        result = super().forward(input, target)
        if self._codistiller is not None and self._codistiller.active:
            penalty = self._penalty(self._codistiller, input, target, result["output"])
            result["loss"] = result["loss"] + (penalty - penalty.detach()).to(result["loss"].dtype)
        return result

    def metrics(self) -> dict[str, float]:
        """`codistill_…` values for the epoch's metrics, always the same keys; empty without `--codistill`."""
        found = self._codistiller.metrics() if self._codistiller is not None else {}
        return {f"codistill_{name}": value for name, value in found.items()}

    @property
    def updates(self) -> int:
        """Updates done so far."""
        return self._update

    def remember_generators(self) -> None:
        """Collect the random generators for the next checkpoint of a synchronous run. Every worker must call it."""
        if self._generators is not None:
            self._drawn = self._generators.collect()

    def finish(self) -> None:
        """Training has ended normally: publish the final weights, within `--codistill-timeout`, and stop.

        Raises:
            ExchangeFailed: After trouble, with `--codistill-on-error fail`.
        """
        if self._codistiller is not None:
            self._codistiller.finish(self._update)

    def close(self) -> None:
        """Stop what runs in the background; safe to call twice, and at any time."""
        if self._codistiller is not None:
            self._codistiller.close()

    def prepare_distributed(self, device_ids: Optional[list[Any]] = None, **ddp_kwargs: Any) -> CodistillationTask:
        """Wrap the model in DistributedDataParallel, which takes no device ids on a CPU."""
        super().prepare_distributed(device_ids=None if self.device.type == "cpu" else device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: Optional[str] = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model; peers are compiled the same way when they come."""
        self._compiled = {"backend": backend, "mode": mode, **compile_kwargs}
        return super().compile(backend=backend, mode=mode, **compile_kwargs)

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> dict[str, Any]:
        """What a checkpoint must hold beside the model, in plain types."""
        state = super().get_task_state(module=module, ema=ema)
        if ema or self._codistiller is None:
            return state
        if self._update >= self._update_after:  # not so timm's recovery files: train.py resumes at whole epochs
            self._checkpoint_at = self._update
        ours: dict[str, Any] = self._codistiller.state_dict()
        if self._weight_decay is not None:
            ours["decaying"] = self._weight_decay.decaying
        if self._drawn is not None:
            ours["generators"] = self._drawn
        return {**state, _STATE: ours}

    def load_task_state(
        self,
        state: Optional[dict[str, Any]],
        strict: bool = True,
        module: Optional[nn.Module] = None,
        ema: bool = False,
    ) -> None:
        """Take up what `get_task_state` gave, or go on without when a plain run wrote the checkpoint."""
        host = {name: value for name, value in (state or {}).items() if name != _STATE}
        super().load_task_state(host or None, strict=strict, module=module, ema=ema)
        if not ema:
            self._restored = dict((state or {}).get(_STATE) or {})

    def _begin(self, config: CodistillConfig, dataset: Any, save_dir: Optional[str | Path]) -> None:
        if config.peers > 1 and getattr(self._optimizer, "is_second_order", False):
            raise ConfigError(
                f"--codistill: {type(self._optimizer).__name__} takes second derivatives, which the penalty does not "
                "have; choose another --opt, or leave --codistill out"
            )
        if config.publish == "ema" and not self.has_ema():
            raise ConfigError(
                f"{flag('publish')} ema: there is no moving average of the weights; add --model-ema, or leave it out"
            )
        model = unwrap_model(self.trainable_module)
        classes = getattr(model, "num_classes", None)
        self._codistiller = Codistiller(
            config,
            model=model,
            build_peer=self._build_peer,
            fingerprint=fingerprint(classes, dataset),
            save_dir=Path(save_dir or "."),  # worker 0 alone writes there
            architecture=self._architecture,
            build_unlike=lambda name, arguments: architectures.build(name, arguments, classes),
            place=lambda module: self._compile_like_ours(architectures.place(module, model)),
            published_state=self._averaged if config.publish == "ema" else None,
        )
        atexit.register(self._codistiller.close)
        if self._restored:
            self._codistiller.load_state_dict(self._restored)
        if self._weight_decay is not None:
            self._weight_decay.decaying = self._restored.get("decaying")
        if config.sync:
            self._generators = Generators(self.device)
            self._generators.restore(self._restored.get("generators") or [])

    def _begin_update(self) -> None:
        if self._codistiller is None:
            return
        if self._sampling is not None and self._sampling.position is None:
            raise ConfigError(
                f"{flag('exchange')} prediction: all peers must go through the same batches; iterate over "
                "task.batches(loader) in place of the loader"
            )
        if self._checkpoint_at is not None:  # train.py goes on training only when it is written
            self._codistiller.checkpoint_saved(self._checkpoint_at)
            self._checkpoint_at = None
        self._codistiller.begin_update(self._update, self._epoch)
        if self._weight_decay is not None:
            self._weight_decay.apply(self._optimizer.param_groups, self._update, self._epoch - 1)
        if self._sampling is not None and self._sampling.position is not None:
            self._sampling.skip_to(self._codistiller.begin_batch(self._sampling.position))

    def _penalty(self, codistiller: Codistiller, input: Tensor, target: Tensor, output: Tensor) -> Tensor:
        own = self._counted(output)
        inputs = (input, target) if self._sampling is not None else ()
        found = codistiller.penalty(own, lambda peer: self._predicted(peer, input), inputs=inputs)
        return codistiller.alpha / len(own) * found.loss

    def _predicted(self, peer: nn.Module, input: Tensor) -> Tensor:
        """A peer's logits, from a copy of the batch: a model may change its input in place."""
        logits: Tensor = peer(self._counted(input).clone())
        return logits if self._compiled is None else logits.clone()  # before a CUDA graph uses their memory again

    def _counted(self, batch: Tensor) -> Tensor:
        """The part of a batch that the penalty covers."""
        splits = self.criterion.num_splits if isinstance(self.criterion, JsdCrossEntropy) else 1
        return batch[: len(batch) // splits]

    def _build_peer(self) -> nn.Module:
        return self._compile_like_ours(copy.deepcopy(unwrap_model(self.trainable_module)))

    def _compile_like_ours(self, peer: nn.Module) -> nn.Module:
        """In place, so that the names of its weights stay the same."""
        if self._compiled is not None:
            peer.compile(**self._compiled)
        return peer

    def _averaged(self) -> dict[str, Tensor]:
        state = unwrap_model(self.get_trainable_module(ema=True)).state_dict()
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
