"""float16 with the scaler that timm's train.py puts around it; on a CPU torch's scaler looks for infinity too."""

import copy

import pytest
import torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import nn
from torch.nn import functional as F

from tests.timm_codistill.fixtures_tasks import IMAGES, LABELS, MODELS, gradients, loader, peers  # noqa: F401

# ruff: noqa: F811

SCALE = 2.0**19  # so large that the first updates overflow
CALM = 2.0**10  # and here none does


def half():
    return torch.autocast("cpu", dtype=torch.float16)


class Training:
    """A task in the hands of train.py's training step.

    Attributes:
        updates: as train.py counts them, those that the scaler skipped included.
        skipped: how many of them it skipped.
    """

    def __init__(self, task, updates=0, scale=SCALE):
        self.task, self.updates, self.skipped = task, updates, 0
        self.optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=0.05, weight_decay=1e-3)
        self.scaler = NativeScaler(device="cpu")
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "growth_interval": 3})

    def train(self, updates, accumulated=1):
        for _ in range(updates):
            before = self.scaler.state_dict()["scale"]
            for batch in range(accumulated):
                with half():
                    loss = self.task(IMAGES, LABELS)["loss"]
                if accumulated > 1:
                    loss /= accumulated  # in place, as train.py does
                self.scaler(
                    loss,
                    self.optimizer,
                    clip_grad=1.0,
                    parameters=self.task.get_clip_parameters(),
                    need_update=batch + 1 == accumulated,
                )
            self.skipped += self.scaler.state_dict()["scale"] < before
            self.updates += 1
            self.optimizer.zero_grad()
            self.task.update_ema(step=self.updates)
        return self

    def checkpoint(self):
        """What timm's CheckpointSaver writes."""
        state = {"optimizer": self.optimizer.state_dict(), "amp_scaler": self.scaler.state_dict()}
        return copy.deepcopy({**state, **self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True)})


def assert_finite(model):
    assert all(value.isfinite().all() for value in model.state_dict().values())


def with_a_peer(peers, build, *flags):
    """Our task, of which a snapshot of a peer that has ended is in use, and how many updates that took."""
    torch.manual_seed(1)
    peers.publish(build())
    own = build()
    task = peers.task(0, own, *flags)
    peers.until_it_has_a_peer(task, own.train())
    return task, own


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_at_weight_0_every_update_is_timm_s_own_to_the_last_bit_those_that_are_skipped_too(peers, name):
    task, own = with_a_peer(peers, MODELS[name], "--codistill-alpha", "0")
    plain = ClassificationTask(copy.deepcopy(own), nn.CrossEntropyLoss())
    trainings = []
    for each in (task, plain):
        each.setup_ema(decay=0.9)
        trainings.append(Training(each, updates=task.updates).train(8, accumulated=2))
    found, wanted = trainings
    assert 0 < found.skipped == wanted.skipped < 8
    state = found.checkpoint()
    assert state.pop("task_state").keys() == {"codistill"}
    torch.testing.assert_close(state, wanted.checkpoint(), rtol=0, atol=0)
    assert task.updates == found.updates
    assert task.metrics()["codistill_peers"] == 1


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_with_a_penalty_skipped_updates_are_counted_as_train_py_counts_them_and_nothing_else_happens(peers, name):
    task, own = with_a_peer(peers, MODELS[name])
    plain = Training(ClassificationTask(copy.deepcopy(own), nn.CrossEntropyLoss()), updates=task.updates).train(8)
    training = Training(task, updates=task.updates).train(8)
    assert 0 < training.skipped < 8
    assert_finite(own)
    assert task.updates == training.updates == plain.updates
    assert task.get_task_state()["codistill"]["update"] == training.updates - 1  # the one begun last
    assert task.metrics()["codistill_loss"] > 0
    assert task.metrics()["codistill_incidents"] == 0
    classifiers = [model.get_classifier().weight for model in (own, plain.task.trainable_module)]
    assert not torch.equal(*classifiers)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_the_penalty_s_gradient_is_scaled_as_the_loss_s_is(peers, name):
    task, own = with_a_peer(peers, MODELS[name], "--codistill-alpha", "0.7")
    own.eval()  # for both to see the same statistics
    scale = 2.0**12
    with half():
        result = task(IMAGES, LABELS)
        host = F.cross_entropy(own(IMAGES), LABELS)
    assert result["loss"].item() == host.item()
    scaled = [gradients(own, loss * scale) for loss in (result["loss"], host)]
    found = torch.cat([(both - alone).flatten() / scale for both, alone in zip(*scaled, strict=True)])

    penalty = task._codistiller.penalty(own(IMAGES), lambda peer: peer(IMAGES)).loss / len(IMAGES)
    wanted = torch.cat([gradient.flatten() for gradient in gradients(own, 0.7 * penalty)])
    assert wanted.norm() > 0
    assert (found - wanted).norm() / wanted.norm() < 0.05  # float16 against float32


def test_a_run_that_is_stopped_and_resumed_between_overflows_gives_the_same_bits(peers):
    task, _ = with_a_peer(peers, MODELS["vit"])
    whole = Training(task, updates=task.updates).train(2)
    saved, updates = whole.checkpoint(), whole.updates
    whole.train(8)
    assert 0 < whole.skipped < 8
    task.close()

    resumed = peers.task(0, MODELS["vit"]())
    again = Training(resumed, updates=updates)
    resumed.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    again.optimizer.load_state_dict(saved["optimizer"])
    again.scaler.load_state_dict(saved["amp_scaler"])
    resumed.begin_epoch(updates, loader(), again.optimizer, save_dir=peers.folder / "0")  # each epoch is one update
    again.train(8)
    assert again.skipped > 0
    assert resumed.metrics()["codistill_incidents"] == 0
    found, wanted = again.checkpoint(), whole.checkpoint()
    for state in (found, wanted):
        assert state.pop("task_state")["codistill"]["in_use"]["1"]["final"]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def far_out():
    """A model that predicts what float16 cannot hold."""
    model = create_model("test_vit", num_classes=5, img_size=32)
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    return model


def test_a_peer_whose_predictions_overflow_in_float16_costs_the_penalty_of_those_batches_and_is_counted(peers):
    torch.manual_seed(1)
    published, own = peers.publish(far_out(), updates=1), MODELS["vit"]()
    assert_finite(published)
    assert published(IMAGES).isfinite().all()
    with half():
        assert not published(IMAGES).isfinite().all()
    task = peers.task(0, own)
    peers.until_it_has_a_peer(task, own.train())
    task(IMAGES, LABELS)  # in single precision it is as good as any
    assert task.metrics()["codistill_incidents"] == 0
    training = Training(task, updates=task.updates, scale=CALM)
    plain = Training(ClassificationTask(copy.deepcopy(own), nn.CrossEntropyLoss()), scale=CALM).train(3)
    training.train(3)
    assert training.skipped == plain.skipped == 0
    for ours, theirs in zip(own.parameters(), plain.task.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with half():
        task(IMAGES, LABELS)  # begins an update, at which the three before are looked at
    assert task.metrics()["codistill_loss"] == 0
    assert dict(task._codistiller._incidents.counts) == {"non-finite": 3}
