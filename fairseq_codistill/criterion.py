"""Criterion `codistill`: label-smoothed cross-entropy, and in training the penalty for differing from the peers.

Without a penalty (weight 0, burn-in, one peer, no peer at hand) it is `label_smoothed_cross_entropy` to the last bit.
What it logs as `loss` and `nll_loss`, and all of validation, is the host's own loss; the penalty is logged beside it.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion, label_smoothed_nll_loss
from fairseq.logging import metrics
from fairseq.utils import apply_to_sample
from torch import Tensor, nn

from codistill import ConfigError
from fairseq_codistill.hooks import TaskHooks
from fairseq_codistill.options import (
    CodistillCriterionConfig,
    codistill_config,
    label_smoothing_schedule,
    refuse_host_options,
)

_SUMS = ("codistill_loss", "codistill_agreement", "codistill_positions")


@register_criterion("codistill", dataclass=CodistillCriterionConfig)
class CodistillCriterion(LabelSmoothedCrossEntropyCriterion):
    """Adds α_k · mean over peers of D(own, peer), summed over target tokens like the loss (2010.02838, equation 1).

    Anything that cannot work ends the process with one line.
    """

    def __init__(self, task: Any, cfg: Any) -> None:
        """Hook into `task`, which carries the update counter and the checkpoints; nothing starts before training."""
        super().__init__(
            task,
            sentence_avg=cfg.sentence_avg,
            label_smoothing=cfg.label_smoothing,
            ignore_prefix_size=cfg.ignore_prefix_size,
            report_accuracy=cfg.report_accuracy,
        )
        root = cfg._get_root() if hasattr(cfg, "_get_root") else None
        try:
            config = codistill_config(cfg)
            self._smoothing = label_smoothing_schedule(cfg)
            refuse_host_options(root, config)
            self._hooks = TaskHooks(task, config, root)
        except ConfigError as error:
            raise SystemExit(str(error)) from None
        self._bits = 1.0 if config.loss == "mse" else math.log(2)  # fairseq logs in base 2

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        """The host's loss, sample size and logging output; in training with the penalty and its sums."""
        if not self.training:
            return super().forward(model, sample, reduce)
        if self._hooks.codistiller is not None and not self._hooks.dummy:
            self._hooks.codistiller.predict_early(lambda peer: _predicted(peer, sample))
        net_output = model(**sample["net_input"])
        logged, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        loss = self._smoothed(model, net_output, sample, reduce, logged)
        penalty, sums = self._penalty(net_output, sample)
        logging_output = {
            "loss": logged.data,
            "nll_loss": nll_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample["target"].size(0) if self.sentence_avg else sample["ntokens"],
            **dict(zip(_SUMS, sums, strict=True)),
        }
        if self.report_accuracy:
            correct, total = self.compute_accuracy(model, net_output, sample)
            logging_output["n_correct"] = correct.item()
            logging_output["total"] = total.item()
        return loss if penalty is None else loss + penalty, logging_output["sample_size"], logging_output

    def _smoothed(
        self, model: nn.Module, net_output: Any, sample: dict[str, Any], reduce: bool, logged: Tensor
    ) -> Tensor:
        """The loss to train with: under a smoothing schedule not the one that is logged."""
        if self._smoothing is None:
            return logged
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        epsilon = self._smoothing.at(update=self._hooks.update, epochs=self._hooks.epoch - 1)
        return label_smoothed_nll_loss(lprobs, target, epsilon, ignore_index=self.padding_idx, reduce=reduce)[0]

    def _penalty(self, net_output: Any, sample: dict[str, Any]) -> tuple[Optional[Tensor], tuple[Tensor, ...]]:
        """The penalty, None without one, and its sums.

        These are tensors either way: fairseq adds up the workers' tensors in one buffer and their numbers in another,
        and one worker of a peer may have a penalty where another has none.
        """
        codistiller = self._hooks.codistiller
        if codistiller is None or not codistiller.active or self._hooks.dummy:
            return None, torch.zeros(len(_SUMS), dtype=torch.float32, device=net_output[0].device).unbind()
        found = codistiller.penalty(
            net_output[0],
            lambda peer: _predicted(peer, sample),
            self._mask(sample["target"]),
            _inputs(sample) if self._hooks.coordinated else (),
        )
        compared = found.positions * (found.peers > 0)  # on the device, as the others are
        return codistiller.alpha * found.loss, (found.loss.detach() / self._bits, found.agreement, compared)

    def _mask(self, target: Tensor) -> Tensor:
        """The positions that the host's loss counts."""
        mask = target.ne(self.padding_idx)
        if self.ignore_prefix_size > 0:
            mask[:, : self.ignore_prefix_size] = False
        return mask

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """The host's metrics; in training also `codistill_loss` and `codistill_agreement`, means over target tokens."""
        super().reduce_metrics(logging_outputs)
        if not any("codistill_positions" in log for log in logging_outputs):
            return
        loss, agreement, positions = (sum(float(log.get(name, 0.0)) for log in logging_outputs) for name in _SUMS)
        metrics.log_scalar("codistill_loss", loss / max(positions, 1.0), positions, round=3)
        metrics.log_scalar("codistill_agreement", agreement / max(positions, 1.0), positions, round=3)


def _predicted(peer: nn.Module, sample: dict[str, Any]) -> Tensor:
    """A peer's logits, from a copy of the batch: a model may change its input in place."""
    logits: Tensor = peer(**apply_to_sample(torch.clone, sample["net_input"]))[0]
    return logits


def _inputs(sample: dict[str, Any]) -> list[Tensor]:
    """The batch itself: what the model is fed, in the order of the names, and the targets."""
    fed = [value for _, value in sorted(sample["net_input"].items()) if isinstance(value, Tensor)]
    return [*fed, sample["target"]]
