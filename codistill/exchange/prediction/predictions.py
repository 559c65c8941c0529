"""Exchange by prediction: peers go through the same micro-batches in step and swap their logits for each of them.

Worker r of each peer is in a group with worker r of the others; worker 0 of each finds the others (`Rendezvous`), and
this peer's workers meet once an update so that all are in the same group, or in none. Any fault of a group costs the
penalty of that micro-batch, and the group: training goes on at once, and the peers that are there meet again. Peers
that differ in their data go without penalties for those micro-batches. Every wait is bounded, and so is the sum of
those that were in vain (`Patience`). Nothing is signed or encrypted: this is for a trusted network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn

from codistill.config import CodistillConfig
from codistill.exchange.heartbeat import Heartbeat
from codistill.exchange.manifest import MOST
from codistill.exchange.membership import Identity
from codistill.exchange.prediction.board import open_board
from codistill.exchange.prediction.forming import Forming, Patience, State
from codistill.exchange.prediction.in_step import InStep
from codistill.exchange.prediction.posts import Proposal, from_words, to_words
from codistill.exchange.prediction.rendezvous import Rendezvous, Standing
from codistill.exchange.protocol import OnCopy, Position
from codistill.meters import Incidents, logger
from codistill.workers import Workers, WorkersLost

START_SECONDS = 10.0  # longest wait at a group's start for one that is still connecting
BACK_OFF = 1.0  # seconds after a group that was not; twice as long each time
BACK_OFF_DIFFERENT = 30.0  # after one whose members have different data
BACK_OFF_MOST = 600.0
GOODBYE_SECONDS = 5.0  # longest wait for the others' next micro-batch when we leave them
LEAVING_SECONDS = 30.0  # out of the group after SIGTERM, should the process live on


@dataclass(frozen=True)
class Present:
    """A peer that exchanges with us at every micro-batch; it is never stale."""

    def staleness(self, update: int) -> int:
        """None."""
        return 0

    def gap(self, update: int) -> int:
        """None that means anything: peers in step may count their updates differently."""
        return 0


class PredictionExchange:
    """This worker's side of the exchange; all workers of a peer are called at the same updates and positions."""

    def __init__(self, config: CodistillConfig, workers: Workers, save_dir: Path, incidents: Incidents) -> None:
        """Nothing is read, written or opened before `start`.

        Args:
            config: validated options; its `dir` or its `rendezvous` is set.
            workers: of this peer.
            save_dir: of this peer; holds the token that owns the peer number.
            incidents: told of every refusal and fault.
        """
        self._config, self._workers, self._save_dir, self._incidents = config, workers, save_dir, incidents
        self._rendezvous: Optional[Rendezvous] = None
        self._heartbeat: Optional[Heartbeat] = None
        self._patience = Patience(config.timeout)
        self._willing = False
        self._fresh = False  # an update has begun, and none of its micro-batches yet
        self._position = Position(0, 0)
        self._batches = self._in_update = 0
        self._step = 1
        self._group: Optional[InStep] = None
        self._before: Optional[InStep] = None  # kept open until all members have come to the one after it
        self._forming: Optional[Forming] = None
        self._taken_up = 0  # micro-batches done when the group being formed was taken up
        self._skip_to: Optional[Position] = None
        self._generation = 0
        self._pause = 0.0  # the last back-off
        self._avoided: dict[int, tuple[float, float]] = {}  # by peer, the last back-off from it, and until when
        self._lost_at, self._ready_from = -math.inf, -math.inf
        self._sent = self._received = 0  # by groups that are no more
        self._over = False

    def start(
        self,
        identity: Identity,
        terms: Mapping[str, Any],
        update: int,
        on_copy: OnCopy,
    ) -> None:
        """Join the run.

        Args:
            identity: output space and initial weights of this peer.
            terms: what all peers of the run must agree on.
            update: updates done so far.
            on_copy: not called: no weights are published.

        Raises:
            ConfigError: the dir or the port cannot be opened, the run has other terms, or the number is taken.
        """
        self._workers.together(lambda: self._join(identity, terms))

    def begin_update(self, update: int, *, willing: bool) -> None:
        """`update` updates are done; `willing`: the penalty has a weight from now on."""
        self._step = max(self._step, self._in_update)
        self._in_update = 0
        self._willing, self._fresh = willing, True

    def begin_batch(self, position: Position) -> Optional[Position]:
        """The next micro-batch is at `position`; gives where to go on after this update, when we are behind."""
        self._position = position
        self._batches += 1
        self._in_update += 1
        fresh, self._fresh = self._fresh, False
        if not fresh or not self._willing or self._over:
            return None
        try:
            return self._settle(position)
        except WorkersLost as error:
            self.end_without_workers(error)
        except Exception as error:  # a fault of ours must not end the run
            self._break_off("internal", f"{type(error).__name__}: {error}")
        return None

    @property
    def publishes(self) -> bool:
        """Nothing is published."""
        return False

    def boundary(self, update: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Nothing is published."""
        return False

    def predict_early(self, forward: Callable[[nn.Module], Tensor], update: int) -> None:
        """Nothing: the other members predict."""

    def predictions(
        self, own: Tensor, forward: Callable[[nn.Module], Tensor], inputs: Sequence[Tensor], update: int
    ) -> list[Tensor]:
        """The other members' logits for this micro-batch, in the order of their numbers; none after any trouble."""
        if self._group is None:
            return []
        found = self._group.swap(own, inputs, self._position)
        self._retire_group_before()  # all have come to this one
        return found

    def in_use(self, update: int) -> dict[int, Present]:
        """The other members of the group that we are in."""
        if self._group is None or self._group.lost or not self._willing:
            return {}
        return {member: Present() for member in self._group.members if member != self._config.peer}

    @property
    def counters(self) -> dict[str, int]:
        """Bytes sent to and received from the other members since the start, by this worker; nothing is skipped."""
        groups = [group for group in (self._group, self._before) if group is not None]
        return {
            "sent": self._sent + sum(group.sent for group in groups),
            "received": self._received + sum(group.received for group in groups),
            "skipped": 0,
        }

    def set_floor(self, update: int) -> None:
        """Nothing is kept for a restart."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is taken up again: a restarted peer meets the others where they are."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take up."""

    def finish(self, update: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Training has ended normally."""
        self._close(self._config.timeout, ended=True)

    def leave(self, update: int, epoch: int, metrics: Mapping[str, float], seconds: float) -> None:
        """The process is about to be ended from outside: let the others go on without us, for some time at least."""
        if self._group is not None:
            self._group.close()
        if self._forming is not None:
            self._forming.abandon()
        self._ready_from = time.monotonic() + LEAVING_SECONDS

    def close(self, seconds: Optional[float] = None) -> None:
        """Tell the others that we are gone, and stop, within `seconds`; safe to call twice."""
        self._close(self._config.timeout if seconds is None else seconds, ended=False)

    def end_without_workers(self, error: WorkersLost) -> None:
        """Exchange no more: the workers of this peer cannot meet."""
        self._break_off("workers", str(error))

    def _break_off(self, cause: str, why: str) -> None:
        self._workers.close()  # first, for those who still wait for us
        self._incidents.report(cause, f"{why}; the exchange is over, training goes on")
        self.close(1.0)

    def _join(self, identity: Identity, terms: Mapping[str, Any]) -> None:
        if not self._workers.first:
            return
        config, terms = self._config, {**terms, "workers": self._workers.size}
        board, self._heartbeat = open_board(config, terms, self._save_dir, self._incidents)
        self._rendezvous = Rendezvous(
            board,
            run=config.run_id,
            peer=config.peer,
            peers=config.peers,
            terms=terms,
            init_hash=identity.init_hash,
            incidents=self._incidents,
        )
        self._rendezvous.start()

    def _settle(self, position: Position) -> Optional[Position]:
        """The workers of this peer agree what group they are in, once an update."""
        offer = self._rendezvous.offer() if self._rendezvous is not None else None
        if self._group is not None and self._rendezvous is not None and self._rendezvous.retired:
            self._group.close()
        offered = (offer.generation if offer is not None else 0) if self._workers.first else MOST
        forming = self._forming.state if self._forming is not None else State.PENDING
        lost = self._group is not None and self._group.lost
        generation, fine, state = self._workers.minimum([offered, not lost, forming])
        if not fine:
            self._give_up()
        if generation and state != State.READY:  # else the others may exchange in that group already
            self._form(self._shared(offer))
        elif state == State.FAILED:
            self._fail()
        elif self._forming is not None:
            self._approach(self._forming, State(state), position)
        if self._forming is not None and position >= self._forming.proposal.start:
            self._change_over(self._forming)
        if self._skip_to is not None and (self._forming is None or position >= self._skip_to):
            self._skip_to = None
        self._tell(position)
        return self._skip_to

    def _shared(self, offer: Optional[Proposal]) -> Proposal:
        return Proposal.parse(from_words(self._workers.share(to_words(b"" if offer is None else offer.to_json()))))

    def _form(self, proposal: Proposal) -> None:
        """Begin to connect."""
        if self._forming is not None:
            self._forming.abandon()
        self._generation, self._taken_up, self._skip_to = proposal.generation, self._batches, None
        self._forming = Forming(proposal, self._config.peer, self._workers.rank)
        if self._workers.first:
            logger.info(
                "codistill: peers %s exchange predictions from epoch %d, batch %d on",
                ", ".join(map(str, proposal.members)),
                proposal.start.epoch,
                proposal.start.batch,
            )

    def _approach(self, forming: Forming, state: State, position: Position) -> None:
        """On the way to a group's start: skip what is further than the others' lead, but only for those that came.

        What the others say of their position alone must not cost us data, nor keep us from other groups for long.
        """
        start, lead = forming.proposal.start, forming.proposal.lead
        if position >= start or (position.epoch == start.epoch and start.batch - position.batch <= 2 * lead):
            return
        if state == State.READY:
            if self._skip_to is None:
                self._skip(position, start)
        elif self._batches - self._taken_up > 4 * lead:  # the others have been at the start for long
            self._fail()

    def _skip(self, position: Position, start: Position) -> None:
        """Go on at `start`; those that have been in step with us must not wait for us before that."""
        if self._workers.first:
            logger.info("codistill: this one goes on there from epoch %d, batch %d", position.epoch, position.batch)
        if self._group is not None:
            began = time.monotonic()
            self._group.leave(min(GOODBYE_SECONDS, self._patience.limit()))
            self._patience.spend(time.monotonic() - began)  # nothing is exchanged for it
            self._discard_groups()
        self._skip_to = start

    def _change_over(self, forming: Forming) -> None:
        """We are at a group's start: all workers are connected, after a short wait if need be, or none takes it."""
        began = time.monotonic()
        forming.wait(min(START_SECONDS, self._patience.limit()))
        [state] = self._workers.minimum([forming.state])
        if state != State.READY:
            self._patience.spend(time.monotonic() - began)
            self._fail()
            return
        self._retire_group_before()
        self._before = self._group
        config, members = self._config, forming.proposal.members
        self._group = InStep(forming.take(), members, config.dtype, config.topk, self._patience, self._incidents)
        self._forming = self._skip_to = None

    def _fail(self) -> None:
        """What was being formed has come to nothing."""
        forming, self._forming = self._forming, None
        if forming is not None:
            forming.abandon()
            peers = ", ".join(map(str, forming.proposal.members))
            why = f": {forming.why}" if forming.why else ""
            self._incidents.report("late", f"peers {peers} could not be connected in time{why}", about=peers)
        self._step_back()

    def _give_up(self) -> None:
        """All workers of this peer leave the group: at once into another, unless it was not worth its while."""
        group = self._group
        self._discard_groups()
        self._lost_at = time.monotonic()
        if group is not None and group.proven:
            self._pause = 0.0
            for member in group.members:
                self._avoided.pop(member, None)
        elif group is not None and group.apart:
            self._avoid(group.unlike)
        else:
            self._step_back()

    def _avoid(self, peers: Collection[int]) -> None:
        """Be in no group with these for a while; with others at once."""
        for peer in peers:
            before, _ = self._avoided.get(peer, (0.0, 0.0))
            pause = min(max(BACK_OFF_DIFFERENT, 2 * before), BACK_OFF_MOST)
            self._avoided[peer] = pause, time.monotonic() + pause

    def _step_back(self) -> None:
        self._pause = min(max(BACK_OFF, 2 * self._pause), BACK_OFF_MOST)
        self._ready_from = max(self._ready_from, time.monotonic() + self._pause)

    def _discard_groups(self) -> None:
        self._retire_group_before()
        self._before, self._group = self._group, None
        self._retire_group_before()

    def _retire_group_before(self) -> None:
        group, self._before = self._before, None
        if group is not None:
            self._sent, self._received = self._sent + group.sent, self._received + group.received
            group.close()

    def _tell(self, position: Position) -> None:
        if self._rendezvous is None:
            return
        now, pause = time.monotonic(), self._patience.pause()
        group, forming = self._group, self._forming
        members = forming.proposal.members if forming is not None else group.members if group is not None else ()
        self._rendezvous.tell(
            Standing(
                position=position,
                batches=self._batches,
                step=self._step,
                generation=self._generation,
                members=members,
                forming=forming is not None or (group is not None and not group.met),
                lost=self._lost_at,
                ready_from=max(self._ready_from, now + pause if pause else -math.inf),
                avoided=frozenset(peer for peer, (_, until) in self._avoided.items() if now < until),
                told=now,
            )
        )

    def _close(self, seconds: float, *, ended: bool) -> None:
        if self._over:
            return
        self._over = True
        end = time.monotonic() + seconds
        if self._forming is not None:
            self._forming.abandon()
        if ended and self._group is not None and not self._group.lost:
            self._group.leave(min(seconds, GOODBYE_SECONDS))
        self._discard_groups()
        if self._rendezvous is not None:
            self._rendezvous.close(min(seconds, 5.0), ended=ended)
        if self._heartbeat is not None:
            self._heartbeat.close(max(0.0, end - time.monotonic()), ended=ended)
