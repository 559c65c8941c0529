"""The generators' states travel through a checkpoint as plain types."""

import json
import random

import numpy
import torch

from timm_codistill.generators import Generators


def draw():
    return random.random(), random.gauss(), numpy.random.standard_normal(3).tolist(), torch.rand(3).tolist()


def test_what_is_drawn_after_restoring_is_what_was_drawn_after_collecting():
    generators = Generators(torch.device("cpu"))
    draw()
    states = json.loads(json.dumps(generators.collect()))
    expected = draw()
    draw()
    generators.restore(states)
    assert draw() == expected


def test_states_of_another_number_of_workers_are_left_alone():
    generators = Generators(torch.device("cpu"))
    states = generators.collect()
    before = torch.get_rng_state()
    generators.restore(states * 2)
    assert torch.equal(torch.get_rng_state(), before)
