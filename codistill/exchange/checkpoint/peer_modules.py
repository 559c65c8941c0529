"""The other peers as modules of our own, each holding the weights of its last accepted snapshot.

A module is built when its peer's first snapshot comes, and anew when the peer comes back as another model. There are
never more modules than peers are learnt from at a time: a new neighbour gets the module of a former one. A module runs
in eval mode without autograd. A peer that cannot be built, loaded or run is left out until it sends something new: an
incident, never an exception.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Container, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
from torch import Tensor, nn

from codistill.exchange.checkpoint.architectures import Architecture, Architectures
from codistill.exchange.checkpoint.meeting import Proposal
from codistill.exchange.manifest import Reference
from codistill.exchange.snapshot import load, tensors_of
from codistill.meters import Incidents


@dataclass(frozen=True)
class InUse:
    """A peer's snapshot that predictions are compared with."""

    proposal: Proposal
    accepted: int  # own update at which it was taken up

    def staleness(self, update: int) -> int:
        """Own updates since it was taken up; a final snapshot never goes stale."""
        return 0 if self.proposal.final else update - self.accepted

    def gap(self, update: int) -> int:
        """Own update minus the peer's."""
        return update - self.proposal.reference.update

    def dated_back(self, before: InUse) -> InUse:
        """Taken up when `before` was, but not later than now: the host's counter may have been set back to 0.

        The same weights are final if they were: what is final only afterwards says so in `latest.json` alone.
        """
        same = replace(self.proposal, final=before.proposal.final) == before.proposal
        return InUse(before.proposal if same else self.proposal, min(before.accepted, self.accepted))


class PeerModules:
    """Which snapshots are in use, and the modules that hold them.

    Attributes:
        neighbours: the peers that are learnt from now; others stay in use until their modules are needed.
    """

    def __init__(self, architectures: Architectures, most: int, staleness_bound: int, incidents: Incidents) -> None:
        """Nothing is built yet.

        Args:
            architectures: builds the modules.
            most: modules there may be, the number of peers learnt from at a time.
            staleness_bound: own updates after which a snapshot is no longer used.
            incidents: told of every peer that fails.
        """
        self._architectures, self._incidents = architectures, incidents
        self._most, self._bound = most, staleness_bound
        self.neighbours: Collection[int] = ()
        self._modules: dict[int, nn.Module] = {}
        self._built: dict[int, Optional[Architecture]] = {}
        self._places: dict[int, set[int]] = {}  # where in memory its parameters and buffers lie
        self._held: dict[int, InUse] = {}
        self._former: dict[int, InUse] = {}  # what was held last of those that are not held any more
        self._failed: dict[int, Proposal] = {}  # the last of each peer that could not be loaded or run

    @property
    def peers(self) -> Collection[int]:
        """Those whose snapshots are held, however stale."""
        return self._held.keys()

    def held(self, peer: int) -> Optional[InUse]:
        """What the peer's module holds, however stale."""
        return self._held.get(peer)

    def tried(self, peer: int) -> Container[Optional[Proposal]]:
        """What there is no use in taking up once more: what the peer's module holds, and what failed in it last."""
        held = self._held.get(peer)
        return {None if held is None else held.proposal, self._failed.get(peer)}

    def in_use(self, update: int) -> dict[int, InUse]:
        """The peers whose snapshots are not too stale at `update`."""
        return {peer: used for peer, used in self._held.items() if used.staleness(update) <= self._bound}

    def predictions(self, forward: Callable[[nn.Module], Tensor], update: int) -> dict[int, Tensor]:
        """What `forward` gives, without autograd, for every peer in use at `update`, by its number, in their order.

        The tensors may be overwritten: none is a part of a module.
        """
        found = {}
        for peer in sorted(self.in_use(update)):
            try:
                with torch.no_grad():
                    logits = forward(self._modules[peer])
                    found[peer] = logits.clone() if _place(logits) in self._places[peer] else logits
            except Exception as error:  # no memory for it, say: ours must have what it took
                del self._modules[peer]
                self._leave_out(self._held[peer].proposal, error)
        return found

    def fitting(self, found: Mapping[int, Tensor], shape: torch.Size) -> list[Tensor]:
        """Those of the `predictions` that can be compared with ours, of `shape`; the other peers are left out."""
        for peer, logits in found.items():
            if logits.shape != shape:
                message = f"its predictions have shape {tuple(logits.shape)}, ours {tuple(shape)}"
                self._leave_out(self._held[peer].proposal, ValueError(message))
        return [logits for logits in found.values() if logits.shape == shape]

    def make_room(self, peer: int) -> Optional[InUse]:
        """Let `peer` have the module that is needed least, if there are as many as there may be and none is its own.

        Returns:
            What the module held, and still holds until the next swap.
        """
        spare = [p for p in self._modules if p not in self.neighbours or p not in self._held]
        if peer in self._modules or len(self._modules) < self._most or not spare:
            return None
        giver = min(spare, key=lambda p: (self._held[p].accepted if p in self._held else -1, p))
        self._modules[peer], self._built[peer] = self._modules.pop(giver), self._built.pop(giver)
        self._places[peer] = self._places.pop(giver)
        held = self._held.pop(giver, None)
        if held is not None:
            self._former[giver] = held
        return held

    def swap(
        self, proposal: Proposal, architecture: Optional[Architecture], tensors: Mapping[str, Tensor], update: int
    ) -> bool:
        """Put a verified snapshot's tensors into the peer's module, between two updates.

        Returns:
            False when that failed; the peer is left out then, since its module may be half loaded.
        """
        peer = proposal.peer
        try:
            if peer not in self._modules or self._architectures.differ(architecture, self._built[peer]):
                self._modules.pop(peer, None)  # first, for its memory
                module = self._architectures.build(architecture)
                self._places[peer] = {_place(part) for part in itertools.chain(module.parameters(), module.buffers())}
                self._modules[peer], self._built[peer] = module, architecture
            load(tensors_of(self._modules[peer]), tensors)
            self._modules[peer].train().eval()  # what a model keeps of its weights for eval mode is of the former ones
        except Exception as error:
            self._leave_out(proposal, error)
            return False
        before = self._held.get(peer) or self._former.get(peer)
        known = before is not None and before.proposal == proposal  # nothing new: it is as stale as it was
        self._held[peer] = before if before is not None and known else InUse(proposal, update)
        self._former.pop(peer, None)
        return True

    def date_back(self, before: Mapping[int, InUse]) -> None:
        """After a resume: what was taken up again counts from when it was first taken up."""
        self._held = {peer: used.dated_back(before[peer]) for peer, used in self._held.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is held, in plain types."""
        return {
            str(peer): {
                "incarnation": used.proposal.reference.incarnation,
                "update": used.proposal.reference.update,
                "sequence": used.proposal.reference.sequence,
                "sha256": used.proposal.sha256,
                "final": used.proposal.final,
                "accepted": used.accepted,
            }
            for peer, used in self._held.items()
        }

    def _leave_out(self, failed: Proposal, error: Exception) -> None:
        peer = failed.peer
        self._failed[peer] = failed
        if peer in self._held:
            self._former[peer] = self._held.pop(peer)
        self._incidents.report("internal", f"peer {peer}: {type(error).__name__}: {error}", about=str(peer))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def held_before(state: Mapping[str, Any]) -> dict[int, InUse]:
    """By peer, what `PeerModules.state_dict` said was held."""
    found = {}
    for name, used in state.items():
        reference = Reference(int(used["incarnation"]), int(used["update"]), int(used["sequence"]))
        proposal = Proposal(int(name), reference, str(used["sha256"]), bool(used["final"]))
        found[int(name)] = InUse(proposal, int(used["accepted"]))
    return found
