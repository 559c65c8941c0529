"""Peers of several workers train on the digits, log, resume and are killed, as a user would start them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from timm.models import create_model

from codistill import KEYS
from tests.integration import timm_trainings
from tests.integration.timm_trainings import SECONDS, SYNC, UPDATES

script, runs = timm_trainings.script, timm_trainings.runs

CODISTILLED = ["train_codistill_" + key for key in KEYS]


def torchrun(runs, number, *flags):
    """Start peer `number` as two workers under torchrun."""
    where = ["--standalone", "--nproc-per-node", "2", "-m", "timm_codistill", runs.script]
    ours = ["--codistill", "--codistill-dir", str(runs.exchange), "--codistill-peer", str(number)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *where, *runs.flags(f"run-{number}"), *ours, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=runs.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def test_two_peers_of_two_workers_train_under_torchrun_log_and_resume(runs):
    flags = ("--codistill-interval", "2", "--codistill-sync", "--codistill-weight-decay", "0:1e-3,2:1e-4")
    started = [torchrun(runs, number, *flags) for number in (0, 1)]
    try:
        for process in started:
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    saved = yaml.safe_load((runs.folder / "out" / "run-1" / "args.yaml").read_text(encoding="utf-8"))
    assert (saved["codistill"], saved["codistill_interval"], saved["seed"]) == (True, 2, 1)

    # Everything again, from the saved arguments and the last checkpoint, for one epoch more.
    again = []
    for number in (0, 1):
        folder = runs.folder / "out" / f"run-{number}"
        more = ("-c", folder / "args.yaml", "--resume", folder / "last.pth.tar", "--epochs", "3")
        again.append(runs.start(f"run-{number}", *more, codistilled=True, workers=2))
    updates = UPDATES // 2
    for training in again:
        training.wait()
        assert len(training.records(1)) == updates
        # A resumed timm writes its header again.
        rows = [row for row in training.summary() if row["epoch"] != "epoch"]
        assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
        assert all(column in rows[0] for column in CODISTILLED)
        assert float(rows[-1]["train_codistill_peers"]) == 1
        assert float(rows[-1]["train_codistill_loss"]) > 0
        assert float(rows[-1]["eval_top1"]) > 15
        assert sorted({line["update"] for line in training.metrics()}) == sorted(
            {*range(2, 3 * updates + 1, 2), 3 * updates}
        )
        assert {line["incidents"] for line in training.metrics()} == {0}
        checkpoint = training.checkpoint()
        decays = [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]]
        assert sorted(decays) == [0, 1e-4]
        create_model("test_resnet", num_classes=10).load_state_dict(checkpoint["state_dict"])
        latest = json.loads((runs.exchange / "default/peers" / training.save_dir.name[-1] / "latest.json").read_text())
        assert latest["manifest"]["final"]
        assert latest["manifest"]["architecture"]["name"] == "test_resnet.r160_in1k"
        assert latest["manifest"]["architecture"]["arguments"]["num_classes"] == 10
    states = [training.checkpoint()["state_dict"] for training in again]
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])


def test_a_synchronous_run_killed_and_restarted_gives_the_same_bits(runs):
    flags = (*SYNC, "--epochs", "3", "--model-ema", "--model-ema-decay", "0.9")
    wanted = [runs.peer(number, *flags, run_id="whole") for number in (0, 1)]
    found = [runs.peer(number, *flags, run_id="killed", pause=0.05) for number in (0, 1)]
    found[1].reach(2 * UPDATES + 4).kill()
    found[1] = runs.peer(1, *flags, "--resume", found[1].save_dir / "last.pth.tar", run_id="killed")
    for training in (*wanted, *found):
        training.wait()
    for peer, whole in zip(found, wanted, strict=True):
        for name in ("state_dict", "state_dict_ema", "optimizer"):
            torch.testing.assert_close(peer.checkpoint()[name], whole.checkpoint()[name], rtol=0, atol=0)
        assert peer.records()[-UPDATES:] == whole.records()[-UPDATES:]


def test_sigterm_to_the_loader_s_processes_too_as_slurm_sends_it_loses_nothing(runs):
    peer = runs.peer(0, "--workers", "2", "--epochs", "100", "--codistill-interval", "1000", pause=0.05).reach(5)
    [process] = peer.processes
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == -signal.SIGTERM, peer.errors()
    latest = json.loads((runs.exchange / "run/peers/0/latest.json").read_text())
    assert latest["manifest"]["update"] == len(peer.records())
    assert "Traceback" not in peer.errors()


OPTIONS = {
    "mixup, cutmix, binary cross-entropy": ("--mixup", "0.2", "--cutmix", "0.5", "--bce-loss", "--no-prefetcher"),
    "Jensen-Shannon over augmentation splits": ("--aug-splits", "2", "--jsd-loss", "--split-bn", "--aa", "rand-m3"),
    "half precision, channels last, compiled": (
        *("--amp", "--amp-dtype", "bfloat16", "--channels-last", "--torchcompile", "aot_eager", "--mixup", "0.2"),
        # On one pixel a CPU's half precision leaves the gradient of some weights of a 3 x 3 convolution to chance.
        *("--input-size", "3", "32", "32"),
    ),
}


@pytest.mark.parametrize("flags", OPTIONS.values(), ids=OPTIONS.keys())
def test_under_timm_s_own_options_weight_0_is_the_plain_training_and_a_penalty_gets_through(runs, flags):
    flags = (*flags, "--epochs", "1", "--recovery-interval", "4")
    plain = runs.stock("plain", *flags)
    off = runs.peer(0, *flags, *SYNC, "--codistill-alpha", "0")
    on = runs.peer(1, *flags, *SYNC)
    for training in (plain, off, on):
        training.wait()
    assert off.records() == plain.records()
    torch.testing.assert_close(off.checkpoint()["state_dict"], plain.checkpoint()["state_dict"], rtol=0, atol=0)
    assert [(line["update"], line["peers"], line["alpha"]) for line in on.metrics()] == [
        *((update, 1, 1.0) for update in (5, 10, UPDATES)),
    ]
    assert on.metrics()[1]["loss"] > 0
    assert {line["incidents"] for line in on.metrics()} == {0}
    names = {file.name for file in plain.save_dir.iterdir()}
    assert {file.name for file in on.save_dir.iterdir() if "codistill" not in file.name} == names | {"metrics.jsonl"}


def test_what_cannot_be_codistilled_ends_with_one_line(runs, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("codistill_loss: l2\n", encoding="utf-8")
    refused = {
        "--kd-model-name: cannot be combined with --codistill: it distils from a fixed network with a task of its "
        "own; leave one of them out": ("--kd-model-name", "test_resnet"),
        "--codistill-loss l2: must be one of kl, mse, ce": ("-c", config),
    }
    started = {line: runs.peer(0, *flags, run_id=Path(flags[-1]).stem) for line, flags in refused.items()}
    for line, training in started.items():
        assert training.fails().splitlines() == [line]
