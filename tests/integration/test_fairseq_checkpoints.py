"""Checkpoints: what codistilled trainings write, read, and go on from."""

import math
import re

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.models.transformer import TransformerModel

from tests.integration.fairseq_trainings import USER_DIR, run

# What stock fairseq needs under torch 2.6 and later to read any checkpoint of its own.
ANY_PICKLE = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
SCHEDULES = (
    *("--codistill-sync", "--codistill-alpha-growth", "1.1", "--codistill-alpha-every", "4"),
    *("--codistill-label-smoothing", "0:0.1,25u:0.05", "--weight-decay", "0.1"),
    *("--codistill-weight-decay", "0:0.1,15u:0,25u:0.2"),
)


def optimizer_groups(training):
    return training.checkpoint()["last_optimizer_state"]["param_groups"]


def hypotheses(output):
    lines = re.findall(r"^H-\d+\t.*$", output, flags=re.MULTILINE)
    assert len(lines) >= 10
    return lines


def host_loss(training):
    """The label-smoothed loss per token (bits) over the validation set, by plain fairseq alone."""
    path = str(training.save_dir / "checkpoint_last.pt")
    [model], _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    assert type(model) is TransformerModel
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.1).eval()
    model.eval()
    task.load_dataset("valid")
    loss = tokens = 0.0
    for sample in task.get_batch_iterator(task.dataset("valid"), max_tokens=300).next_epoch_itr(shuffle=False):
        with torch.no_grad():
            found, count, _ = criterion(model, sample)
        loss, tokens = loss + found.item(), tokens + count
    return loss / tokens / math.log(2)


def test_training_resumes_where_it_ended_and_its_checkpoints_are_the_hosts(trainings, monkeypatch):
    whole = [trainings.peer(number, *SCHEDULES, run_id="whole") for number in (0, 1)]
    begun = [trainings.peer(number, *SCHEDULES, run_id="parts", updates=18) for number in (0, 1)]
    for training in (*whole, *begun):
        training.wait()
    initial = (begun[0].save_dir / "codistill-init.safetensors").read_bytes()
    assert {group["weight_decay"] for group in optimizer_groups(begun[0])} == {0.0}

    resumed = trainings.peer(0, *SCHEDULES, run_id="parts", updates=30).wait()
    assert "@ 18 updates)" in resumed.output()
    assert resumed.records()[:20] == whole[0].records()  # to the last bit: the peer in use is taken up again
    assert [update for update, added in resumed.penalties().items() if added] == list(range(5, 30))
    assert [line["update"] for line in resumed.metrics()] == [5, 10, 15, 18, 20, 25, 30]
    assert [line["gap"] for line in resumed.metrics()] == [0, 0, 0, 3, 2, 7, 12]  # the other peer ended at 18
    assert [line["staleness"] for line in resumed.metrics()] == [0, 0, 0, 3, 0, 0, 0]  # and its last never goes stale
    assert resumed.metrics()[-1]["incidents"] == 0
    assert resumed.metrics()[-1]["distance"] > resumed.metrics()[-4]["distance"]
    assert (resumed.save_dir / "codistill-init.safetensors").read_bytes() == initial
    assert {group["weight_decay"] for group in optimizer_groups(resumed)} == {0.2}

    toy, checkpoint = trainings.toy.translation, resumed.save_dir / "checkpoint_last.pt"
    task = ("--task", "translation", "-s", "src", "-t", "tgt", "--cpu", "--beam", "2", "--max-len-b", "12")
    ours = run("generate", toy, "--user-dir", USER_DIR, "--path", checkpoint, *task)
    plain = run("generate", toy, "--path", checkpoint, *task, env=ANY_PICKLE)
    assert hypotheses(ours) == hypotheses(plain)

    [setting] = ANY_PICKLE.items()
    monkeypatch.setenv(*setting)
    logged = float(resumed.logged("valid")[-1]["valid_loss"])
    assert host_loss(resumed) == pytest.approx(logged, abs=2e-3)


def test_a_plain_checkpoint_can_be_what_codistillation_starts_from(trainings):
    begun = trainings.stock("begun", updates=5).wait()
    restore = (
        *("--restore-file", begun.save_dir / "checkpoint_last.pt"),
        *("--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"),
    )
    plain = trainings.stock("plain", *restore, updates=15, env=ANY_PICKLE)
    ours = trainings.peer(0, *restore, peers=1, updates=15)
    assert ours.wait().records() == plain.wait().records()
