"""The hooks, on a module that has nothing but the names they take the place of."""

import argparse
import contextlib
import json
import os
import types
from collections import OrderedDict

import pytest
import torch
from timm.models import create_model
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from codistill import KEYS
from timm_codistill import hooks
from timm_codistill.data import SEED_STRIDE


def script(main, *flags):
    """A module whose `main` is given the module and the parsed arguments."""
    module = types.ModuleType("train")
    module.parser = argparse.ArgumentParser()
    module.parser.add_argument("--seed", type=int, default=42)
    module.parser.add_argument("--grad-accum-steps", type=int, default=1)
    module.parser.add_argument("--stop-epoch", type=int, default=None)  # from timm 1.0.31, like the next
    module.parser.add_argument("--task", default="classification")
    module.ClassificationTask = ClassificationTask
    module.create_model = create_model
    module.create_dataset = lambda *args, **kwargs: kwargs
    module.create_loader = lambda *args, **kwargs: kwargs
    module.train_one_epoch = train_one_epoch

    def parse_args():
        args = module.parser.parse_args(list(map(str, flags)))
        return args, json.dumps(vars(args))

    module._parse_args = parse_args
    module.main = lambda: main(module, *module._parse_args())
    return module


def train_one_epoch(epoch, model, loader, optimizer, args, task=None, output_dir=None, num_updates_total=None):
    for batch, (images, labels) in enumerate(loader):
        task(images, labels)["loss"].backward()
        optimizer.step()
        task.update_ema(step=epoch * len(loader) + batch + 1)
    return OrderedDict(loss=1.0)


def train(module, args, folder, made=None, epochs=2):
    """`main`, as far as it concerns us; gives the metrics of each epoch, of which only the first is trained."""
    model = module.create_model("test_resnet", num_classes=5, in_chans=3, drop_rate=0.1)
    task = (made or module.ClassificationTask)(model=model, criterion=nn.CrossEntropyLoss())
    loader = DataLoader(TensorDataset(torch.randn(6, 3, 32, 32), torch.arange(6) % 5), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keywords = {"task": task, "output_dir": folder, "num_updates_total": epochs * len(loader)}
    return module.train_one_epoch(0, model, loader, optimizer, args, **keywords)


def latest(folder):
    return json.loads((folder / "exchange/default/peers/1/latest.json").read_text(encoding="utf-8"))


def peer(folder):
    return ("--codistill", "--codistill-dir", folder / "exchange", "--codistill-peer", 1, "--codistill-interval", 2)


def test_without_the_switch_nothing_changes_but_the_help():
    seen = []
    module = script(
        lambda module, args, text: seen.append((module.ClassificationTask, module.train_one_epoch, args.seed))
    )
    hooks.run(module)
    assert seen == [(ClassificationTask, train_one_epoch, 42)]
    assert "--codistill-dir" in module.parser.format_help()


def test_the_epoch_s_metrics_get_ours_and_the_saved_arguments_keep_the_seed_that_was_given(tmp_path):
    seen = []
    module = script(
        lambda module, args, text: seen.extend([args.seed, json.loads(text)["seed"], train(module, args, tmp_path)]),
        *peer(tmp_path),
    )
    hooks.run(module)
    assert seen[:2] == [42 + SEED_STRIDE, 42]
    assert list(seen[2]) == ["loss", *(f"codistill_{key}" for key in KEYS)]
    assert seen[2]["loss"] == 1.0


def test_the_last_checkpoint_is_never_absent_while_a_newer_one_takes_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointSaver, "_replace", CheckpointSaver._replace)  # to be put back
    hooks.run(script(lambda module, args, text: None, *peer(tmp_path)))
    last, newer = tmp_path / "last.pth.tar", tmp_path / "tmp.pth.tar"
    last.write_text("older")
    newer.write_text("newer")
    model = torch.nn.Linear(1, 1)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_dir=str(tmp_path))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            saver._replace(str(newer), str(last))
    assert last.read_text() == "older"
    saver._replace(str(newer), str(last))
    assert last.read_text() == "newer"


@pytest.mark.parametrize(("epochs", "final"), [(1, True), (2, False)], ids=["to the end", "interrupted"])
def test_only_a_training_that_came_to_its_end_leaves_a_final_snapshot(tmp_path, epochs, final):
    def main(module, args, text):
        with contextlib.suppress(KeyboardInterrupt):  # as timm's script does
            train(module, args, tmp_path, epochs=epochs)
            raise KeyboardInterrupt

    hooks.run(script(main, *peer(tmp_path)))
    assert latest(tmp_path)["manifest"]["final"] is final


@pytest.mark.parametrize("counted", ["schedule", "stop"])
def test_a_training_that_is_to_be_continued_after_its_stop_epoch_leaves_no_final_snapshot(tmp_path, counted):
    def main(module, args, text):
        train(module, args, tmp_path, epochs={"schedule": 2, "stop": args.stop_epoch}[counted])

    hooks.run(script(main, *peer(tmp_path), "--stop-epoch", 1))
    assert latest(tmp_path)["manifest"]["final"] is False
    assert latest(tmp_path)["manifest"]["update"] == 2


class MultiLabelTask(ClassificationTask):
    """Like one that timm 1.0.31 has."""


def test_another_task_than_classification_is_refused_with_one_line(tmp_path):
    def main(module, args, text):
        train(module, args, tmp_path, made=MultiLabelTask)

    with pytest.raises(SystemExit) as ended:
        hooks.run(script(main, *peer(tmp_path)))
    assert str(ended.value) == (
        "--codistill: train.py made a MultiLabelTask, only plain classification can be codistilled; "
        "leave out the option that chooses another task, or --codistill"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--codistill-peers", 2), "--codistill-dir is missing: 2 peers need a folder or bucket"),
        (
            ("--codistill-peers", 1, "--task", "multilabel"),
            "--task multilabel: cannot be combined with --codistill: peers are compared as distributions over classes; "
            "leave one of them out",
        ),
    ],
)
def test_a_bad_option_ends_before_anything_is_built(tmp_path, flags, line):
    with pytest.raises(SystemExit) as ended:
        hooks.run(script(lambda module, args, text: pytest.fail("it went on"), "--codistill", *flags))
    assert str(ended.value).startswith(line)


def test_peers_are_told_with_what_train_py_has_made_the_model(tmp_path):
    hooks.run(script(lambda module, args, text: train(module, args, tmp_path, epochs=1), *peer(tmp_path)))
    assert latest(tmp_path)["manifest"]["architecture"] == {
        "name": "test_resnet.r160_in1k",
        "arguments": {"in_chans": 3, "num_classes": 5},
    }


def test_a_loader_without_workers_is_not_asked_to_keep_them(tmp_path):
    seen = []

    def main(module, args, text):
        seen.extend(module.create_loader(None, num_workers=workers) for workers in (0, 2))

    hooks.run(script(main, *peer(tmp_path)))
    assert seen == [{"num_workers": 0, "persistent_workers": False}, {"num_workers": 2}]


@pytest.mark.parametrize(("exchange", "common"), [("checkpoint", False), ("prediction", True)])
def test_only_exchange_by_prediction_gives_the_training_data_a_common_seed_and_new_workers_each_epoch(
    tmp_path, exchange, common
):
    seen = []

    def main(module, args, text):
        for training in (True, False):
            given = {"is_training": training, "seed": args.seed}
            seen.append(module.create_dataset("", **given)["seed"] - args.seed)
            given = {"is_training": training, "num_workers": 2, "batch_choice_seed": args.seed}
            seen.append(module.create_loader(None, **given))

    flags = ("--codistill-exchange", exchange, "--codistill-data-seed", 7)
    hooks.run(script(main, *peer(tmp_path), *flags))
    seed = 42 + SEED_STRIDE
    own = {"num_workers": 2, "batch_choice_seed": seed}
    if common:
        assert seen[:2] == [
            7 - seed,
            {"is_training": True, **own, "batch_choice_seed": 7, "persistent_workers": False},
        ]
    else:
        assert seen[:2] == [0, {"is_training": True, **own}]
    assert seen[2:] == [0, {"is_training": False, **own}]


def test_a_peer_trains_on_its_own_shard(tmp_path):
    seen = []

    def main(module, args, text):
        module.create_dataset("", is_training=True)
        module.create_dataset("", is_training=False)

    def create_dataset(*arguments, **kwargs):
        reader = types.SimpleNamespace(samples=list(range(10)))
        seen.append(types.SimpleNamespace(reader=reader))
        return seen[-1]

    for number in (0, 1):
        module = script(main, *peer(tmp_path), "--codistill-peer", number, "--codistill-data-shard")
        module.create_dataset = create_dataset
        hooks.run(module)
    kept = [dataset.reader.samples for dataset in seen]
    assert sorted(kept[0] + kept[2]) == kept[1] == kept[3] == list(range(10))
    assert len(kept[0]) == 5


def test_a_shard_where_all_train_on_the_same_batches_ends_before_anything_is_built(tmp_path):
    flags = ("--codistill-data-shard", "--codistill-exchange", "prediction")
    with pytest.raises(SystemExit) as ended:
        hooks.run(script(lambda module, args, text: pytest.fail("it went on"), *peer(tmp_path), *flags))
    assert str(ended.value) == (
        "--codistill-data-shard: with --codistill-exchange prediction all peers train on the same batches; "
        "leave one of them out"
    )
