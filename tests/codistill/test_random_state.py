"""Building a peer's module must not be noticed by any generator that training draws from."""

import random

import numpy
import pytest
import torch

from codistill import untouched_generators


def draw():
    return random.random(), numpy.random.rand(), torch.rand(1).item(), torch.nn.Linear(2, 2).weight.sum().item()


def seed():
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)


def test_what_is_drawn_inside_does_not_change_what_is_drawn_after():
    seed()
    expected = [draw(), draw()]
    seed()
    found = [draw()]
    with untouched_generators():
        draw()
        seed()
        draw()
    found.append(draw())
    assert found == expected


def test_the_generators_are_restored_after_an_error_too():
    seed()
    expected = draw()
    seed()
    with pytest.raises(ZeroDivisionError), untouched_generators():
        draw()
        1 / 0  # noqa: B018
    assert draw() == expected


def test_blocks_can_be_nested():
    seed()
    expected = draw()
    seed()
    with untouched_generators():
        draw()
        with untouched_generators():
            draw()
    assert draw() == expected
