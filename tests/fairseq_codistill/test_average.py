"""`--codistill-publish ema`: the average that fairseq keeps is what the others get."""

import pytest
import torch
from fairseq.logging import metrics
from fairseq.models.ema import build_ema
from fairseq.tasks.translation import TranslationTask
from safetensors import safe_open

from tests.fairseq_codistill.toy_host import batch, data, hosts, quick_exchange  # noqa: F401
from tests.fixtures_peers import until

AVERAGE = ("--store-ema", "--ema-decay", "0.5", "--codistill-publish", "ema")


class Trainer:
    """fairseq's trainer, as far as its average goes: made after the first update, handed over when the task says so."""

    def __init__(self, host):
        self.host, self.ema, self.updates = host, None, 0

    def step(self, sample):
        given = {}
        if getattr(self.host.task, "uses_ema", False):
            assert self.ema is not None, "made now it would not be the average that it is without us"
            given = {"ema_model": self.ema.get_model()}
        self.host.step(sample, self.updates, **given)
        self.host.optimizer.step()
        self.updates += 1
        if self.ema is None:
            self.ema = build_ema(self.host.model, self.host.cfg.ema, torch.device("cpu"))
        self.ema.step(self.host.model, self.updates)

    def validate(self, sample):
        given = {"ema_model": self.ema.get_model()} if getattr(self.host.task, "uses_ema", False) else {}
        return self.host.task.valid_step(sample, self.host.model, self.host.criterion, **given)


@pytest.fixture(autouse=True)
def fresh_log():
    metrics.reset()


def published(tmp_path, update):
    """The weights on the store of that update."""
    [path] = until(lambda: list((tmp_path / "store").rglob(f"{update}-*.safetensors")))
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_average_is_published_in_the_place_of_the_weights(hosts, tmp_path):  # noqa: F811
    host = hosts(0, *AVERAGE)
    trainer, expected, weights = Trainer(host), {}, {}
    for update in range(1, 5):
        trainer.step(batch(host))
        expected[update] = {name: value.clone() for name, value in trainer.ema.get_model().state_dict().items()}
        weights[update] = {name: value.clone() for name, value in host.model.state_dict().items()}
        if update == 2:
            for name, value in published(tmp_path, 1).items():  # from before it is handed over
                if "version" not in name:  # which fairseq's average changes
                    torch.testing.assert_close(value, expected[1][name])
    host.codistiller.finish(4)
    found = published(tmp_path, 4)
    assert len(found) > 10
    for name, value in found.items():
        torch.testing.assert_close(value, expected[4][name], rtol=0, atol=0)
    assert any(not value.equal(weights[4][name]) for name, value in found.items())


def test_weights_that_fairseqs_average_has_lost_are_the_models_own(hosts, tmp_path):  # noqa: F811
    host = hosts(0, *AVERAGE, "--decoder-normalize-before")
    trainer = Trainer(host)
    for _ in range(3):
        trainer.step(batch(host))
    lost = host.model.state_dict().keys() - trainer.ema.get_model().state_dict().keys()
    assert lost  # as of 0.12.3: it takes its own average for that of an old model
    host.codistiller.finish(3)
    found, weights = published(tmp_path, 3), host.model.state_dict()
    assert all(found[name].equal(weights[name]) for name in lost)


def test_after_a_resume_the_first_update_already_has_it(hosts):  # noqa: F811
    host = hosts(0, *AVERAGE)
    metrics.log_scalar("num_updates", 7, weight=0)  # as the trainer does when it has loaded a checkpoint
    host.task.begin_epoch(2, host.model)
    assert host.task.uses_ema
    fresh = hosts(1, *AVERAGE)
    metrics.reset()
    fresh.task.begin_epoch(1, fresh.model)
    assert not getattr(fresh.task, "uses_ema", False)


def test_the_tasks_own_steps_do_not_see_it_unless_the_task_asked(hosts, monkeypatch):  # noqa: F811
    for asks in (False, True):
        seen = []
        monkeypatch.setattr(TranslationTask, "uses_ema", asks, raising=False)
        monkeypatch.setattr(TranslationTask, "train_step", lambda task, seen=seen, **given: seen.append(given))
        monkeypatch.setattr(TranslationTask, "valid_step", lambda task, *steps, seen=seen, **given: seen.append(given))
        host = hosts(int(asks), *AVERAGE)
        given = {"sample": 1, "model": host.model, "criterion": 1, "optimizer": host.optimizer}
        host.task.train_step(**given, update_num=1, ema_model=host.model)
        host.task.valid_step(1, 2, 3, ema_model=host.model)
        assert ["ema_model" in step for step in seen] == [asks, asks]


def test_the_distance_is_that_of_the_weights_themselves(hosts):  # noqa: F811
    found = []
    for flags in (("--codistill-peers", "1"), AVERAGE):
        host = hosts(0, *flags)
        trainer = Trainer(host)
        for _ in range(4):
            trainer.step(batch(host))
        trainer.validate(batch(host))
        found.append(host.codistiller.metrics()["distance"])
        host.codistiller.close()
    assert found[0] == found[1] > 0
