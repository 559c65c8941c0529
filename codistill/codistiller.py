"""The façade that plug-ins call; it knows the host's counters and the exchange, and nothing of the host.

The order of calls: `load_state_dict` (after a resume), then at every update `begin_update` and, while `active`,
`penalty` for each batch; `checkpoint_saved` when a checkpoint is on disk; `finish` when training has ended normally,
else `close`.

With weight 0, during burn-in, or with one peer, nothing is computed, drawn or changed. Trouble with a peer or the
store is counted and logged and never ends the run, unless `on_error` is "fail".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from codistill.config import CodistillConfig, ConfigError
from codistill.exchange.checkpoint.architectures import Architecture, Architectures
from codistill.exchange.checkpoint.checkpoints import CheckpointExchange
from codistill.exchange.membership import Identity
from codistill.exchange.prediction.predictions import PredictionExchange
from codistill.exchange.protocol import Exchange, Position
from codistill.exchange.snapshot import distinct, tensors_of, weights_hash
from codistill.loader_processes import spare_loaders
from codistill.losses import Distilled, distill
from codistill.meters import Distance, Incidents, MetricsFile
from codistill.termination import Termination
from codistill.workers import Workers, WorkersLost

AGREED = ("peers", "interval", "loss", "temperature", "sync", "dtype")
AGREED_WHEN_SET = ("exchange", "topology", "topk")  # absent while they have their defaults


class Codistiller:
    """One worker's codistillation.

    Attributes:
        config: the options.
        alpha: weight of the penalty at the update begun last.
    """

    def __init__(
        self,
        config: CodistillConfig,
        *,
        model: nn.Module,
        build_peer: Callable[[], nn.Module],
        fingerprint: str,
        save_dir: Path,
        architecture: Optional[Architecture] = None,
        build_unlike: Optional[Callable[[str, Mapping[str, Any]], nn.Module]] = None,
        place: Callable[[nn.Module], nn.Module] = lambda module: module,
        published_state: Optional[Callable[[], Mapping[str, Tensor]]] = None,
    ) -> None:
        """Nothing is read, written or started before the first `begin_update`.

        Args:
            config: validated options.
            model: our own model, not wrapped for data parallelism.
            build_peer: gives a module like `model`, in the run's device, precision and memory format; may draw random
                numbers, which are given back.
            fingerprint: sha256 (hex) of the output space: dictionary or class list.
            save_dir: for the owner token, the initial weights and `metrics.jsonl`.
            architecture: registry name and JSON arguments of the model, to be told with every snapshot.
            build_unlike: gives the module that a registry name and JSON arguments describe, wherever torch's default
                device is; None: peers must be like `model`. It is called with what peers say, also from a background
                thread, and raises whatever it likes for what it cannot or will not build.
            place: takes such a module to the run's device, precision and memory format.
            published_state: gives what is published in place of the model's own state, such as its moving average: the
                same names and shapes.
        """
        if config.peers > 1:
            spare_loaders()
        self.config = config
        self.alpha = 0.0
        self._schedule = config.alpha_schedule()
        self._model, self._build_peer, self._build_unlike, self._place = model, build_peer, build_unlike, place
        self._published_state = published_state
        self._fingerprint, self._save_dir, self._architecture = fingerprint, save_dir, architecture
        self._incidents = Incidents(fatal=config.on_error == "fail")
        self._metrics_file = MetricsFile(save_dir, self._incidents)
        self._distance: Optional[Distance] = None
        self._moved: tuple[Optional[int], float] = (None, 0.0)  # the last update at which the distance is known, and it
        self._workers: Optional[Workers] = None
        self._exchange: Optional[Exchange] = None
        self._termination = Termination()
        self._update: Optional[int] = None
        self._epoch = 1
        self._init_hash: Optional[str] = None
        self._restored: Mapping[str, Any] = {}
        self._seconds = 0.0
        self._sums: Optional[Tensor] = None  # of loss, agreement, positions, unusable peers since the last boundary
        self._means = (0.0, 0.0)  # loss and agreement per position, at the last boundary
        self._settled: Optional[int] = None  # the update of that

    def begin_update(self, update: int, epoch: int) -> None:
        """Get ready for the next update; calling it again for the same one changes nothing.

        Args:
            update: updates done so far, by the host's own counter.
            epoch: the host's epoch, from 1.

        Raises:
            ConfigError: at the first update, when the run cannot be joined with these options.
            ExchangeFailed: after trouble, with `on_error` "fail".
        """
        if update == self._update:
            return
        first = self._update is None
        self._update, self._epoch = update, epoch
        self.alpha = self._schedule.at(update + 1, epoch) if self.config.peers > 1 else 0.0
        began = time.perf_counter()
        if first:
            self._start(update)
        if self._termination.requested:
            self._leave(update, epoch)
        if update > 0 and update % self.config.interval == 0:
            self._boundary(update, epoch)
        if self._exchange is not None:
            self._exchange.begin_update(update, willing=self.alpha > 0)
        self._seconds += time.perf_counter() - began
        self._incidents.check()

    def begin_batch(self, position: Position) -> Optional[Position]:
        """Say which micro-batch comes next; after `begin_update`. Only exchange by prediction wants to know.

        Args:
            position: of the micro-batch.

        Returns:
            Where in the data to go on after this micro-batch (or as soon as the update is done), when some has to be
            skipped to meet the other peers there.
        """
        if self._exchange is None:
            return None
        began = time.perf_counter()
        target = self._exchange.begin_batch(position)
        self._seconds += time.perf_counter() - began
        return target

    @property
    def active(self) -> bool:
        """Whether this batch has a penalty: alpha is not 0 and a peer is at hand."""
        return self.alpha > 0 and self._exchange is not None and bool(self._exchange.in_use(self._update or 0))

    def predict_early(self, forward: Callable[[nn.Module], Tensor]) -> None:
        """Let the peers predict before our own forward pass, while `active`; `penalty` for the same batch follows.

        Optional, and nothing changes by it, but their activations are gone before ours come, in whose room they were:
        less memory at the peak, and less to be asked of the system anew. (A model that draws random numbers even in
        eval mode draws them earlier.) When a batch fails in between, call it for the next one, too; what was predicted
        is forgotten with the update.

        Args:
            forward: As for `penalty`.
        """
        if self.active and self._exchange is not None:
            self._exchange.predict_early(forward, self._update or 0)

    def penalty(
        self,
        own: Tensor,
        forward: Callable[[nn.Module], Tensor],
        mask: Optional[Tensor] = None,
        inputs: Sequence[Tensor] = (),
    ) -> Distilled:
        """The distance of our predictions from the peers', not yet multiplied by `alpha`. Only while `active`.

        Args:
            own: our logits, (..., classes).
            forward: gives a peer's logits for the same batch, of the same shape; called without autograd, and not at
                all after `predict_early`. What it gives is overwritten, by checkpoint; it must not share memory with
                the batch, nor with what the next forward pass writes to, as the output of a CUDA graph does.
            mask: (...), True where a position counts.
            inputs: the batch itself, (samples, ...) each: with exchange by prediction all peers' must be equal.

        Returns:
            The sum over positions of the mean over peers of D, with what goes with it.
        """
        assert self._exchange is not None, "there is no penalty while the codistiller is not active"
        began = time.perf_counter()
        peers = self._exchange.predictions(own.detach(), forward, inputs, self._update or 0)
        if self.config.coordinated:  # the wait for others; a peer's own forward pass counts as training
            self._seconds += time.perf_counter() - began
        count = len(peers)
        found = distill(
            own,
            peers,
            loss=self.config.loss,
            temperature=self.config.temperature,
            mask=mask,
            overwrite=self.config.exchange == "checkpoint",
        )
        del peers  # the gradient's memory must not be ours, too
        with torch.no_grad():
            compared = found.positions * (found.peers > 0)
            sums = torch.stack([found.loss.detach().float(), found.agreement, compared, count - found.peers])
            self._sums = sums if self._sums is None else self._sums + sums
        return found

    def metrics(self) -> dict[str, float]:
        """Every key of `codistill.KEYS`; loss, agreement and distance are of the last boundary, once it is measured."""
        update = self._update or 0
        in_use = self._exchange.in_use(update).values() if self._exchange else []
        counters = self._exchange.counters if self._exchange else {"sent": 0, "received": 0, "skipped": 0}
        return {
            "alpha": self.alpha,
            "loss": self._means[0],
            "agreement": self._means[1],
            "peers": len(in_use),
            "staleness": max((used.staleness(update) for used in in_use), default=0),
            "gap": max((used.gap(update) for used in in_use), default=0),
            "distance": self._moved[1],
            "sent": counters["sent"],
            "received": counters["received"],
            "seconds": self._seconds,
            "skipped": counters["skipped"],
            "incidents": self._incidents.total,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, in plain types."""
        return {
            "update": self._update,
            "run_id": self.config.run_id,
            "init_hash": self._init_hash,
            "in_use": self._exchange.state_dict() if self._exchange else self._restored.get("in_use", {}),
            "sums": None if self._sums is None else self._sums.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; before the first `begin_update`. Another run has other snapshots."""
        self._init_hash = state["init_hash"]
        self._restored = dict(state) if state.get("run_id") == self.config.run_id else {}

    def checkpoint_saved(self, update: int) -> None:
        """A checkpoint of `update` is durable: a restart begins there, and the others may forget what is older."""
        if self._exchange is not None:
            self._exchange.set_floor(update)

    def finish(self, update: int) -> None:
        """Training has ended normally after `update` updates: publish the final snapshot and stop, within `timeout`.

        Raises:
            ExchangeFailed: after trouble, with `on_error` "fail".
        """
        if self._update is None:
            return
        self._update = update
        self._settle_sums(update)
        if self._published_state is not None:
            self._measure(update)
        if self._exchange is not None:
            self._exchange.finish(update, self._epoch, self.metrics())
        self._measure(update)  # unless a copy was: nothing has to wait for it any more
        self._report(update)
        self.close()
        self._incidents.check()

    def close(self) -> None:
        """Stop what runs in the background; safe to call twice, and at any time."""
        self._termination.remove()
        if self._exchange is not None:
            self._exchange.close()
        self._metrics_file.flush()
        if self._workers is not None:
            self._workers.close()

    def _start(self, update: int) -> None:
        try:
            self._workers = Workers(timeout=2 * self.config.timeout + 120)
        except WorkersLost as error:
            self._incidents.report("workers", f"{error}; this peer trains on without the exchange")
            return
        state = self._state()
        trainable = {name for name, p in self._model.named_parameters(remove_duplicate=False) if p.requires_grad}
        self._distance = Distance(self._save_dir, trainable & distinct(state).keys())
        resumed = self._init_hash is not None or (update > 0 and self._distance.known)  # with our state, or without
        self._init_hash = self._init_hash or weights_hash(state)
        if resumed:
            self._measure(update)  # the next boundary may be far
            self._take_up_sums()
        elif self._workers.first:
            self._record_initial_weights(self._distance, state)
        by_prediction = self.config.exchange == "prediction"
        if self.config.peers == 1 or (by_prediction and not self.config.coordinated):
            return
        exchange = self._exchange = (
            PredictionExchange(self.config, self._workers, self._save_dir, self._incidents)
            if by_prediction
            else self._by_checkpoint(self._workers, state)
        )
        exchange.load_state_dict(self._restored.get("in_use", {}))
        terms = {name: getattr(self.config, name) for name in AGREED} | {"output": self._fingerprint}
        changed = self.config.changed()
        terms |= {name: changed[name] for name in AGREED_WHEN_SET if name in changed}
        identity = Identity(self._fingerprint, self._init_hash, self._architecture)
        try:
            exchange.start(identity, terms, update, self._on_copy)
        except WorkersLost as error:
            exchange.end_without_workers(error)
        self._termination.install()

    def _by_checkpoint(self, workers: Workers, state: Mapping[str, Tensor]) -> Exchange:
        return CheckpointExchange(
            self.config,
            workers,
            self._save_dir,
            self._published_state or self._state,
            self._architectures(state),
            self._incidents,
        )

    def _architectures(self, state: Mapping[str, Tensor]) -> Architectures:
        try:
            return Architectures(
                self._build_peer, state, self.config.dtype, self._architecture, self._build_unlike, self._place
            )
        except ValueError as error:
            raise ConfigError(f"this model cannot be codistilled: {error}") from None

    def _leave(self, update: int, epoch: int) -> None:
        """SIGTERM has come: publish what we have now, never as final, and let the process go its way."""
        if self._exchange is not None:
            self._exchange.leave(update, epoch, self.metrics(), self._termination.seconds_left)
            if self._termination.deadly:
                self._exchange.close(self._termination.seconds_left)
        self._termination.settle()

    def _boundary(self, update: int, epoch: int) -> None:
        self._settle_sums(update)
        if not self._copied:
            self._measure(update)
        copied = self._exchange is not None and self._exchange.boundary(update, epoch, self.metrics())
        self._report(update, waits=copied)

    def _report(self, update: int, *, waits: bool = False) -> None:
        """A line of `metrics.jsonl`; it `waits` while the distance is measured in the background."""
        if self._workers is not None and self._workers.first:
            line = {"update": update, "epoch": self._epoch, **self.metrics(), "distance": math.nan}
            self._metrics_file.write(line, waits=waits)

    def _settle_sums(self, update: int) -> None:
        """Turn the sums since the last boundary into means; only this, and a checkpoint, reads off the device."""
        if self._sums is None and update == self._settled:
            return  # training ended with an interval
        loss, agreement, positions, unusable = [0.0] * 4 if self._sums is None else self._sums.tolist()
        self._sums, self._settled = None, update
        self._means = (loss / positions, agreement / positions) if positions else (0.0, 0.0)
        if unusable:
            self._incidents.report("non-finite", f"a peer's predictions were not finite in {unusable:g} batches")

    def _take_up_sums(self) -> None:
        """After a resume: what worker 0, which writes checkpoints, had of the interval that was under way."""
        sums = self._restored.get("sums")
        if sums and self._workers is not None and self._workers.first:
            self._sums = torch.tensor(sums, dtype=torch.float32, device=next(self._model.parameters()).device)

    @property
    def _copied(self) -> bool:
        """Whether the distance is measured in the background, on the copy of our own weights that is published."""
        return self._exchange is not None and self._exchange.publishes and self._published_state is None

    def _on_copy(self, update: int, state: Mapping[str, Tensor]) -> dict[str, float]:
        """In the background, with a copy of what is published: the model's own weights, unless told otherwise."""
        if self._published_state is None:
            self._measure(update, state)
        return {"distance": self._moved[1]}

    def _measure(self, update: int, state: Optional[Mapping[str, Tensor]] = None) -> None:
        """Worker 0: learn the distance at `update`, once, of the model or of a copy of its state."""
        if self._distance is None or self._workers is None or not self._workers.first or self._moved[0] == update:
            return
        try:
            moved = self._distance.measure(self._state() if state is None else state)
        except (OSError, SafetensorError, RuntimeError, TypeError, KeyError) as error:  # unreadable, of another model
            moved = math.nan
            self._incidents.report("metrics", f"the distance from initialisation is not known: {error}")
        self._moved = update, moved
        self._metrics_file.measured(update, moved)

    def _record_initial_weights(self, distance: Distance, state: Mapping[str, Tensor]) -> None:
        try:
            distance.record(state)
        except (OSError, SafetensorError) as error:
            self._incidents.report("metrics", f"the initial weights could not be kept: {error}")

    def _state(self) -> dict[str, Tensor]:
        return tensors_of(self._model)
