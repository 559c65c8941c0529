"""Peers of another architecture: built from a name and arguments, bounded, and refused by name when they cannot be."""

import threading

import pytest
import torch
from torch import nn

from codistill.exchange.checkpoint import architectures as module
from codistill.exchange.checkpoint.architectures import LARGEST, TIMES_OURS, Architectures
from codistill.exchange.errors import Refused
from codistill.exchange.snapshot import HostBuffer
from tests.fixtures_peers import CLASSES, peers, quick_exchange  # noqa: F401
from tests.fixtures_store import memory_objects  # noqa: F401

OURS = {"name": "wide", "arguments": {"width": 4}}
DEEP = {"name": "deep", "arguments": {"depth": 3}}


def deep(depth):
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])


def registry(name, arguments):
    """Stands for a host framework's registry."""
    if name == "broken":
        raise RuntimeError("no such\nthing")
    return {"deep": deep, "wide": lambda width: nn.Linear(4, width)}[name](**arguments)


def known(own=OURS, build_unlike=registry, **how):
    like = nn.Linear(4, 4)
    return Architectures(lambda: nn.Linear(4, 4), like.state_dict(), "float32", own, build_unlike, **how)


def refusal(architecture, **how):
    with pytest.raises(Refused) as caught:
        known(**how).template(architecture)
    assert caught.value.cause == "architecture"
    return str(caught.value)


@pytest.mark.parametrize("architecture", [None, OURS, {"name": "wide", "arguments": {"width": 4}}])
def test_what_is_like_ours_is_built_like_ours(architecture):
    found = known(build_unlike=None)
    assert found.build(architecture).state_dict().keys() == nn.Linear(4, 4).state_dict().keys()
    assert found.template(architecture) is found.template(None)


def test_another_architecture_is_built_from_its_name_and_arguments(tmp_path):
    found, weights = known(), deep(3)
    buffer = HostBuffer(weights.state_dict(), "float32")
    buffer.fill(weights.state_dict())
    (tmp_path / "snapshot").write_bytes(buffer.view())
    read = found.template(DEEP).open(tmp_path / "snapshot")
    assert all(torch.equal(read[name], value) for name, value in weights.state_dict().items())
    assert found.build(DEEP).state_dict().keys() == weights.state_dict().keys()


def test_what_a_model_keeps_beside_its_tensors_is_no_part_of_its_snapshot():
    class Telling(nn.Linear):
        def get_extra_state(self):
            return {"version": 2}

    template = known(build_unlike=lambda name, arguments: Telling(4, 4)).template(DEEP)
    assert template.limit == known().template(None).limit


def test_a_built_module_is_placed_in_eval_mode_and_without_gradients():
    found = known(place=lambda module: module.double()).build(DEEP)
    assert not found.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in found.parameters())


def test_looking_at_an_architecture_takes_no_memory_and_draws_no_random_number():
    seen = []

    def watched(name, arguments):
        seen.append(registry(name, arguments))
        return seen[-1]

    found, state = known(build_unlike=watched), torch.get_rng_state()
    found.template(DEEP)
    assert {parameter.device.type for parameter in seen[0].parameters()} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


def test_building_a_module_draws_no_random_number():
    found, state = known(), torch.get_rng_state()
    found.build(DEEP)
    found.build(None)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_architecture_that_cannot_be_built_is_refused_by_its_name():
    message = refusal({"name": "broken", "arguments": {}})
    assert message == "its model broken cannot be built here: RuntimeError: no such"


def test_a_name_with_odd_letters_is_shown_without_them():
    assert "its model \n" not in refusal({"name": "\n\x1b[2J", "arguments": {}})


def test_a_training_that_takes_no_other_architecture_says_so():
    message = refusal(DEEP, build_unlike=None)
    assert (
        message == "its model deep cannot be built here: ValueError: this training takes only peers like its own model"
    )


@pytest.mark.parametrize("odd", [{"name": 3, "arguments": {}}, {"name": "deep"}, {**DEEP, "more": 1}, {}])
def test_what_is_not_a_name_and_arguments_is_refused(odd):
    assert "not a name and arguments" in refusal(odd)


@pytest.mark.parametrize("arguments", [{"depth": LARGEST + 1}, {"depth": [1, {"a": [-LARGEST - 1]}]}])
def test_a_number_that_could_keep_a_constructor_busy_is_refused_before_it_is_called(arguments):
    called = []
    message = refusal({"name": "deep", "arguments": arguments}, build_unlike=lambda *given: called.append(given))
    assert f"a number beyond {LARGEST}" in message
    assert not called


def test_a_model_of_too_many_values_is_refused_while_it_is_built():
    ours = 4 * 4 + 4
    assert known().template({"name": "deep", "arguments": {"depth": TIMES_OURS}})
    assert f"more than {TIMES_OURS} times the values" in refusal(
        {"name": "deep", "arguments": {"depth": TIMES_OURS * ours}}
    )


def test_a_model_of_too_many_modules_is_refused_while_it_is_built(monkeypatch):
    monkeypatch.setattr(module, "MODULES", 5)
    identities = {"name": "deep", "arguments": {"depth": 6}}
    assert "more than 5 modules" in refusal(
        identities, build_unlike=lambda name, arguments: nn.Sequential(*[nn.Identity() for _ in range(6)])
    )


def test_another_thread_makes_what_it_likes_meanwhile():
    made = []

    def build(name, arguments):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(1000, 1000)))
        thread.start()
        thread.join()
        return deep(1)

    known(build_unlike=build).template(DEEP)
    assert made[0].weight.device.type == "cpu"


def test_a_peer_of_another_architecture_is_taken_up_and_predicts(peers):  # noqa: F811
    class Wide(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.second = nn.Linear(4, width), nn.Linear(width, CLASSES)

        def forward(self, inputs):
            return self.second(self.first(inputs))

    def build(name, arguments):
        return {"wide": Wide}[name](**arguments)

    tiny = {"name": "tiny", "arguments": {}}
    one = peers(0, architecture=tiny, build_unlike=build)
    other = peers(1, model=Wide(9), architecture={"name": "wide", "arguments": {"width": 9}}, build_unlike=build)
    with pytest.raises(AssertionError):  # it cannot build ours
        other.step_until(lambda: one.step() or other.metrics()["peers"], limit=100)
    assert one.metrics()["peers"] == 1
    assert one.metrics()["incidents"] == 0
    assert other.causes().keys() == {"architecture"}


def test_a_peer_that_says_something_new_each_time_fills_no_memory(monkeypatch):
    monkeypatch.setattr(module, "KINDS", 3)
    found = known()
    for depth in range(1, 10):
        architecture = {"name": "deep", "arguments": {"depth": depth}}
        assert found.template(architecture) is found.template(architecture)
        assert len(found._unlike) <= 3
