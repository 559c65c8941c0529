"""How jobs that exchange predictions become a group: worker 0 of each posts, reads the others, and follows the first.

Present is whose posts advance while we look, by our own monotonic clock. The lowest-numbered peer that is present and
ready proposes a group of all that follow it, and the micro-batch from which on they exchange; these take that up. All
of it happens in a background thread. Whatever it reads is judged first: a peer of other terms, or of the same initial
weights as ours, is an incident and left out. A board that fails costs the exchange, not the run.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch.distributed as dist

from codistill.config import ConfigError
from codistill.exchange.errors import ExchangeError, Refused, StorageError, same_start
from codistill.exchange.prediction.board import HOST, Board, own_address, serve
from codistill.exchange.prediction.posts import COUNTED, Post, Proposal, plain_terms
from codistill.exchange.protocol import Position
from codistill.exchange.store import compare_terms
from codistill.meters import Incidents, logger

BEAT_SECONDS = 0.5
SLOW_BEAT_SECONDS = 2.0  # while all that are ready are in one group, or there has been nobody for HURRY_SECONDS
HURRY_SECONDS = 30.0
PRESENT_SECONDS = 8.0  # without a new post before a peer counts as absent
QUIET_SECONDS = 10.0  # without a micro-batch of ours before we are not ready: validation, say
SETTLE_SECONDS = 1.5  # to see whose posts advance, and how fast we are, before a group is proposed
LEAD_SECONDS = 2.5  # between a proposal and its start: to hear of it, and to connect
LEAD_UPDATES = 3  # at least
PACE_SECONDS = 20.0  # over which our own pace is taken
CLAIM_SECONDS = 5.0  # between two looks whether somebody has taken our number
UNREACHABLE_SECONDS = 60.0  # before a board that was never reached is an incident: peers start apart
RETRY_SECONDS_MOST = 10.0  # longest pause while the board fails
LINGER_SECONDS = 3.0  # at the end of who hosts the board: for the others to read that it was meant


@dataclass(frozen=True)
class Standing:
    """What the training thread says of itself at every update.

    Attributes:
        position: where this update begins.
        batches: micro-batches done since the start.
        step: micro-batches in an update.
        generation: the newest group that we were in, or tried to be in; 0 for none.
        members: of the group that we are in, or try to be in; () for none.
        forming: whether we still try: its members have not met yet.
        lost: when, by our monotonic clock, we lost the last group: what was posted before then tells nothing.
        ready_from: when we want to be in a group; infinite for never.
        avoided: the peers with which we do not.
        told: when this was said.
    """

    position: Position
    batches: int
    step: int
    generation: int
    members: tuple[int, ...]
    forming: bool
    lost: float
    ready_from: float
    avoided: frozenset[int]
    told: float


@dataclass(frozen=True)
class Heard:
    """What was heard of one peer.

    Attributes:
        post: its newest word.
        advanced: when that came, by our monotonic clock; minus infinity for what was there at the first look.
        before: when the word before it came: it was written later than that.
    """

    post: Post
    advanced: float = -math.inf
    before: float = -math.inf


class Rendezvous:
    """Worker 0's part; one thread."""

    def __init__(
        self,
        board: Board,
        *,
        run: str,
        peer: int,
        peers: int,
        terms: Mapping[str, Any],
        init_hash: str,
        incidents: Incidents,
    ) -> None:
        """Nothing starts before `start`.

        Args:
            board: where everybody posts.
            run: identifier of the run.
            peer: our number.
            peers: in the run.
            terms: what all members must agree on.
            init_hash: of our initial weights.
            incidents: told of every refusal and fault.
        """
        self._board, self._incidents = board, incidents
        self._run, self._peer, self._terms, self._init_hash = run, peer, plain_terms(terms), init_hash
        self._others = [other for other in range(peers) if other != peer]
        self._standing: Optional[Standing] = None
        self._heard: dict[int, Heard] = {}
        self._refused: dict[int, tuple[int, str]] = {}  # by peer, its incarnation and the cause that was reported
        self._leader = peer  # whom we follow
        self._proposal: Optional[Proposal] = None
        self._offer: Optional[Proposal] = None
        self._paces: deque[tuple[float, int]] = deque()
        self._server: Optional[dist.TCPStore] = None
        self._host = ""
        self._counter = 0
        self._settled = True  # nothing to hurry for
        self._claim_seen = -math.inf
        self._reached: Optional[float] = None  # when the board was reached last
        self._began = time.monotonic()
        self._woken = threading.Event()
        self._stopping = False
        self._gone = False
        self._thread = threading.Thread(target=self._loop, name="codistill-rendezvous", daemon=True)

    def start(self) -> None:
        """Begin to post."""
        self._thread.start()

    def tell(self, standing: Standing) -> None:
        """Say where the training thread is; `offer` then gives newer groups than the one told of."""
        hurry = self._standing is None or self._standing.members != standing.members
        self._standing = standing
        if hurry:
            self._woken.set()

    @property
    def retired(self) -> bool:
        """Whether this process may not exchange any more."""
        return self._gone

    def offer(self) -> Optional[Proposal]:
        """The group to take up now, if there is one."""
        offer, standing = self._offer, self._standing
        newest = standing.generation if standing is not None else 0
        return offer if offer is not None and offer.generation > newest else None

    def close(self, seconds: float, *, ended: bool = False) -> None:
        """Say that we are gone and stop, within `seconds`; safe to call twice.

        Args:
            seconds: the bound.
            ended: training has ended normally, and the others shall not take it for a fault.
        """
        end = time.monotonic() + seconds
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        if ended and self._board.hosting and self._anybody_present():
            time.sleep(max(0.0, min(LINGER_SECONDS, end - time.monotonic())))
        if not self._thread.is_alive():
            self._board.close()
            self._server = None

    def _loop(self) -> None:
        pause = BEAT_SECONDS
        while not self._stopping:
            try:
                self._beat()
                pause = SLOW_BEAT_SECONDS if self._settled else BEAT_SECONDS
            except StorageError as error:
                self._unreachable(error)
                pause = min(max(2 * pause, BEAT_SECONDS), RETRY_SECONDS_MOST)
            except ConfigError as error:
                self._retire("terms", str(error))
                return
            except Exception as error:  # a fault of ours must not end the run
                self._incidents.report("internal", f"the rendezvous failed: {type(error).__name__}: {error}")
                pause = RETRY_SECONDS_MOST
            self._woken.wait(pause)
            self._woken.clear()
        try:
            self._say("gone")
        except Exception as error:
            logger.info("codistill: could not tell the other peers that this one is gone: %s", error)

    def _beat(self) -> None:
        if not self._board.join():
            return
        now = time.monotonic()
        if now - self._claim_seen > CLAIM_SECONDS:
            if self._board.superseded():
                self._retire(
                    "superseded", f"peer {self._peer} was started again elsewhere; this process exchanges no more"
                )
                return
            self._claim_seen = now
        self._listen_to_all()
        standing, now = self._standing, time.monotonic()
        ready = standing is not None and self._is_ready(standing, now)
        self._decide(standing if ready else None, now)
        self._say("ready" if ready else "away")
        if self._proposal is not None:  # now that the others can know of it
            self._offer = self._proposal
        self._reached = time.monotonic()

    def _listen_to_all(self) -> None:
        """Hear everybody; whose word alone cannot be read is absent, in a while."""
        unreadable = {}
        for peer in self._others:
            try:
                self._listen(peer)
            except StorageError as error:
                unreadable[peer] = error
        if len(unreadable) == len(self._others):  # then it is the board
            raise unreadable[self._others[0]]
        for peer, trouble in unreadable.items():
            self._tell_once(peer, 0, trouble)

    def _listen(self, peer: int) -> None:
        post: Optional[Post] = None
        try:
            data = self._board.read(peer)
            post = None if data is None else Post.parse(data, self._run, peer)
            if post is not None:
                self._judge(post)
        except Refused as error:
            self._tell_once(peer, 0 if post is None else post.incarnation, error)
            self._heard.pop(peer, None)
            return
        self._refused.pop(peer, None)
        if post is not None:
            self._heard[peer] = _follow(self._heard.get(peer), post, time.monotonic())

    def _tell_once(self, peer: int, incarnation: int, error: ExchangeError) -> None:
        """Count what is wrong with a peer's word, and not again before it is right once."""
        if self._refused.get(peer) != (incarnation, error.cause):
            self._refused[peer] = incarnation, error.cause
            self._incidents.report(error.cause, f"peer {peer} is left out: {error}", about=str(peer))

    def _judge(self, post: Post) -> None:
        compare_terms(self._run, post.terms, self._terms)
        if post.init_hash == self._init_hash:
            raise same_start()

    def _is_ready(self, standing: Standing, now: float) -> bool:
        """Whether we want to be in a group, and the training thread is at work."""
        pace = self._measured_pace(standing, now)
        quiet = max(QUIET_SECONDS, 4 * standing.step / pace if pace else 0.0)
        return now >= standing.ready_from and now - standing.told < quiet

    def _decide(self, standing: Optional[Standing], now: float) -> None:
        """See whom there is to exchange with: lead, or follow the leader. `standing` is None while we are not ready."""
        if standing is None:
            self._settled = True
            self._proposal = self._offer = None
            return
        ready = {
            peer: heard.post
            for peer, heard in self._heard.items()
            if heard.post.state == "ready"
            and now - heard.advanced < PRESENT_SECONDS
            and heard.before >= standing.lost
            and peer not in standing.avoided
        }
        alone = not ready and now - max(self._began, standing.lost) > HURRY_SECONDS
        self._settled = alone or (not standing.forming and {self._peer, *ready} <= set(standing.members))
        self._leader = min([self._peer, *ready])
        if self._leader == self._peer:
            # Who follows somebody else sees a peer that we do not, or leave out.
            self._lead(standing, {peer: post for peer, post in ready.items() if post.leader == self._peer}, now)
        else:
            self._proposal = None
            proposal = ready[self._leader].proposal
            self._offer = proposal if proposal is not None and self._peer in proposal.members else None

    def _lead(self, standing: Standing, ready: Mapping[int, Post], now: float) -> None:
        """Propose a group when one is wanted; stay with the one proposed until it stands, or has failed."""
        if self._proposal is not None and (self._proposal.generation > standing.generation or standing.forming):
            return
        self._proposal = self._offer = None
        unsure = [peer for peer, heard in self._heard.items() if heard.post.state == "ready" and peer not in ready]
        if now - self._paces[0][0] < SETTLE_SECONDS or (unsure and now - standing.lost < SETTLE_SECONDS):
            return
        if ready and {self._peer, *ready} > set(standing.members):  # a member that is busy is waited for
            self._proposal = self._propose(standing, ready)

    def _propose(self, standing: Standing, ready: Mapping[int, Post]) -> Proposal:
        if self._server is None:
            self._server, self._host = serve(), own_address()
        seen = [heard.post for heard in self._heard.values()]
        generations = [post.generation for post in seen]
        generations += [post.proposal.generation for post in seen if post.proposal is not None]
        step = max([standing.step, *(post.step for post in ready.values())])
        pace = max([self._pace, *(post.pace for post in ready.values())]) / 1000
        front = max([standing.position, *(post.position for post in ready.values())])
        lead = max(LEAD_UPDATES * step, math.ceil(LEAD_SECONDS * pace))
        batch = -(-(front.batch + lead) // step) * step
        return Proposal(
            generation=1 + max([standing.generation, *(number for number in generations if number <= COUNTED)]),
            members=tuple(sorted([self._peer, *ready])),
            host=self._host,
            port=self._server.port,
            start=Position(front.epoch, batch),
            lead=batch - front.batch,
        )

    def _say(self, state: str) -> None:
        standing = self._standing
        if self._board.incarnation == 0 or self._gone:
            return
        self._counter += 1
        position = standing.position if standing is not None else Position(0, 0)
        post = Post(
            run=self._run,
            peer=self._peer,
            incarnation=self._board.incarnation,
            counter=self._counter,
            state=state,
            terms=self._terms,
            init_hash=self._init_hash,
            epoch=position.epoch,
            batch=position.batch,
            step=standing.step if standing is not None else 1,
            pace=self._pace,
            generation=standing.generation if standing is not None else 0,
            leader=self._leader,
            proposal=self._proposal if state == "ready" else None,
        )
        self._board.post(post.to_json())

    @property
    def _pace(self) -> int:
        """Micro-batches that we did in 1000 seconds, lately."""
        if len(self._paces) < 2:
            return 0
        (began, first), (ended, last) = self._paces[0], self._paces[-1]
        return round(1000 * (last - first) / max(1e-3, ended - began))

    def _measured_pace(self, standing: Standing, now: float) -> float:
        """Micro-batches a second, between two updates at least, however long they take."""
        if not self._paces or self._paces[-1][1] != standing.batches:
            self._paces.append((standing.told, standing.batches))
        while now - self._paces[0][0] > PACE_SECONDS and len(self._paces) > 2:
            self._paces.popleft()
        return self._pace / 1000

    def _anybody_present(self) -> bool:
        now = time.monotonic()
        return any(
            heard.post.state != "gone" and now - heard.advanced < PRESENT_SECONDS
            for heard in list(self._heard.values())  # the thread may still be at it
        )

    def _unreachable(self, error: StorageError) -> None:
        self._proposal = self._offer = None
        first = self._reached is None and time.monotonic() - self._began < UNREACHABLE_SECONDS
        host = self._heard.get(HOST)
        if first or (host is not None and host.post.state == "gone" and self._board.elsewhere):
            logger.debug("codistill: nobody holds the board: %s", error)
        else:
            self._incidents.report(error.cause, str(error))

    def _retire(self, cause: str, message: str) -> None:
        """Never be in a group again."""
        self._proposal = self._offer = None
        self._stopping = self._gone = True
        self._incidents.report(cause, message)


def _follow(before: Optional[Heard], post: Post, now: float) -> Heard:
    """Add one look to what was heard of a peer."""
    if before is None:
        return Heard(post)
    if (post.incarnation, post.counter) == (before.post.incarnation, before.post.counter):
        return before
    return Heard(post, now, before.advanced)
