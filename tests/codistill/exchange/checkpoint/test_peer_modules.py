"""Modules of peers: as few as peers are learnt from, handed on to new neighbours, and never fresher than they are."""

import gc
import weakref

import pytest
import torch
from torch import nn

from codistill.exchange.checkpoint.architectures import Architectures
from codistill.exchange.checkpoint.meeting import Proposal
from codistill.exchange.checkpoint.peer_modules import PeerModules
from codistill.exchange.manifest import Reference
from codistill.meters import Incidents

WIDE = {"name": "wide", "arguments": {"width": 5}}


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.out = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, inputs):
        return self.out(self.inner(inputs))


class Kept:
    """Two modules at most, and what they were made of."""

    def __init__(self):
        self.built = 0
        own = nn.Linear(3, 2)
        architectures = Architectures(
            self.build,
            own.state_dict(),
            "float32",
            {"name": "linear", "arguments": {}},
            lambda name, args: Wide(**args),
        )
        self.incidents = Incidents(fatal=False)
        self.modules = PeerModules(architectures, 2, 10, self.incidents)

    def build(self):
        self.built += 1
        return nn.Linear(3, 2)

    def take(self, peer, update, *, sequence=None, architecture=None, tensors=None):
        reference = Reference(1, update, update if sequence is None else sequence)
        tensors = tensors or (Wide(5) if architecture else nn.Linear(3, 2)).state_dict()
        self.modules.make_room(peer)
        return self.modules.swap(Proposal(peer, reference, "a" * 64, False), architecture, tensors, update)

    def learn_from(self, *neighbours):
        self.modules.neighbours = neighbours


@pytest.fixture
def kept():
    return Kept()


def test_a_new_neighbour_gets_the_module_of_the_former_one_that_is_oldest(kept):
    kept.learn_from(1, 2)
    assert kept.take(1, 10)
    assert kept.take(2, 8)
    kept.learn_from(3, 1)
    given = kept.modules._modules[2]
    weights = nn.Linear(3, 2).state_dict()
    assert kept.take(3, 12, tensors=weights)
    assert set(kept.modules.in_use(12)) == {1, 3}
    assert kept.modules._modules[3] is given
    assert torch.equal(given.weight, weights["weight"])
    assert kept.built == 2
    kept.learn_from(4, 5)
    assert kept.take(4, 14)
    assert set(kept.modules.peers) == {3, 4}  # 1 was older than 3
    assert kept.take(5, 14)
    assert set(kept.modules.peers) == {4, 5}
    assert len(kept.modules._modules) == kept.built == 2


def test_a_former_neighbour_stays_in_use_while_there_is_room(kept):
    kept.learn_from(1)
    assert kept.take(1, 10)
    kept.learn_from(2)
    assert kept.take(2, 12)
    assert set(kept.modules.in_use(20)) == {1, 2}
    assert set(kept.modules.in_use(21)) == {2}  # and no longer than is allowed


def test_a_module_that_nobody_uses_is_given_away_first(kept):
    kept.learn_from(1, 2)
    assert kept.take(1, 10)
    assert kept.take(2, 11)
    assert not kept.take(2, 12, tensors={"weight": torch.zeros(1)})  # left out from now on
    kept.learn_from(2, 3)
    assert kept.take(3, 12)
    assert set(kept.modules.peers) == {1, 3}
    assert kept.incidents.counts == {"internal": 1}


def test_what_is_taken_up_again_without_anything_new_is_as_stale_as_it_was(kept):
    kept.learn_from(1, 2)
    kept.take(1, 10)
    kept.take(2, 10)
    kept.learn_from(3, 4)
    kept.take(3, 14)
    kept.take(4, 14)
    kept.learn_from(1, 2)
    kept.take(1, 18, sequence=10)
    reference = Reference(1, 10, 10)
    kept.modules.make_room(2)
    kept.modules.swap(Proposal(2, reference, "a" * 64, False), None, nn.Linear(3, 2).state_dict(), 18)
    assert kept.modules.held(2).staleness(18) == 8
    assert kept.modules.held(1).staleness(18) == 0  # something new


def test_what_failed_is_not_worth_another_try_and_if_tried_as_stale_as_it_was(kept):
    def swap(tensors, sequence, update):
        proposal = Proposal(1, Reference(1, 10, sequence), "a" * 64, False)
        return kept.modules.swap(proposal, None, tensors, update), proposal

    def failing(module):
        raise torch.OutOfMemoryError("on purpose")

    good = nn.Linear(3, 2).state_dict()
    taken, first = swap(good, 1, 10)
    assert taken
    assert first in kept.modules.tried(1)
    assert kept.modules.predictions(failing, 12) == {}
    assert kept.modules.held(1) is None
    assert first in kept.modules.tried(1)
    assert swap(good, 1, 18)[0]  # as when another worker could predict, and proposes it
    assert kept.modules.held(1).staleness(18) == 8
    taken, second = swap({"weight": torch.zeros(1)}, 2, 20)
    assert not taken
    assert second in kept.modules.tried(1)
    assert swap(good, 1, 20)[0]  # back to what was there before
    assert second in kept.modules.tried(1)
    assert kept.modules.held(1).staleness(20) == 10
    assert swap(good, 3, 22)[0]
    assert kept.modules.held(1).staleness(22) == 0
    assert first not in kept.modules.tried(1)


def test_what_a_model_keeps_of_its_weights_in_eval_mode_is_not_kept_beyond_them():
    class Keeping(nn.Linear):
        """As timm's LeViT keeps its attention biases."""

        kept = None

        def train(self, mode=True):
            if mode:
                self.kept = None
            return super().train(mode)

        def forward(self, inputs):
            if self.kept is None:
                self.kept = 2 * self.weight
            return nn.functional.linear(inputs, self.kept, self.bias)

    own = Keeping(3, 2).state_dict()
    modules = PeerModules(Architectures(lambda: Keeping(3, 2), own, "float32"), 1, 10, Incidents(fatal=False))
    inputs = torch.randn(4, 3)
    for update in (2, 4):
        publisher = Keeping(3, 2)
        proposal = Proposal(1, Reference(1, update, update), "a" * 64, False)
        assert modules.swap(proposal, None, publisher.state_dict(), update)
        found = modules.predictions(lambda module: module(inputs), update)[1]
        torch.testing.assert_close(found, publisher(inputs))


def test_a_module_that_cannot_predict_gives_its_memory_back(kept):
    kept.take(1, 10)
    modules = []

    def failing(module):
        modules.append(weakref.ref(module))
        raise torch.OutOfMemoryError("on purpose")

    assert kept.modules.predictions(failing, 12) == {}
    gc.collect()
    assert [module() for module in modules] == [None]


def test_what_a_module_keeps_beside_its_tensors_does_not_keep_its_peer_out():
    class Telling(nn.Linear):
        def get_extra_state(self):
            return {"version": 2}

    incidents = Incidents(fatal=False)
    architectures = Architectures(lambda: Telling(3, 2), nn.Linear(3, 2).state_dict(), "float32")
    modules = PeerModules(architectures, 1, 10, incidents)
    proposal = Proposal(1, Reference(1, 10, 1), "a" * 64, False)
    assert modules.swap(proposal, None, nn.Linear(3, 2).state_dict(), 10)
    assert incidents.total == 0


def test_a_neighbour_of_another_architecture_gets_a_module_of_its_own_and_leaves_none_behind(kept):
    kept.learn_from(1, 2)
    kept.take(1, 10)
    kept.take(2, 10)
    kept.learn_from(3, 4)
    assert kept.take(3, 12, architecture=WIDE)
    assert isinstance(kept.modules._modules[3], Wide)
    kept.take(4, 12)
    assert set(kept.modules._modules) == {3, 4}
    kept.learn_from(4, 5)
    assert kept.take(5, 14)
    assert isinstance(kept.modules._modules[5], nn.Linear)
    assert kept.incidents.total == 0


def test_predictions_may_be_overwritten_even_if_a_model_gives_its_own_weights(kept):
    kept.learn_from(1, 2)
    weights = nn.Linear(3, 2).state_dict()
    assert kept.take(1, 10, tensors=weights)
    kept.learn_from(2, 3)
    kept.take(2, 12)
    kept.take(3, 12, tensors=weights)  # in the module that was peer 1's
    found = kept.modules.predictions(lambda module: module.weight, 12)
    found[3].zero_()
    assert torch.equal(kept.modules._modules[3].weight, weights["weight"])


def test_a_peer_whose_predictions_have_another_shape_is_left_out(kept):
    kept.learn_from(1, 2)
    assert kept.take(1, 10)
    assert kept.take(2, 10, architecture=WIDE)
    found = kept.modules.predictions(lambda module: torch.ones(2 if isinstance(module, Wide) else 3), 10)
    assert [tuple(logits.shape) for logits in kept.modules.fitting(found, torch.Size([2]))] == [(2,)]
    assert set(kept.modules.peers) == {2}
    assert kept.incidents.counts == {"internal": 1}
