"""The demo's timm half, and the entry of both halves, on hand-made inputs: nothing is trained."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from codistill import plots
from recipes.embedded import demo as both
from recipes.embedded import measures, steps
from recipes.embedded.progress import Pace, Progress
from recipes.embedded.vision import data, demo, results
from recipes.embedded.vision.arms import SCRIPT, Arm
from recipes.embedded.vision.settings import ARMS, GRID, SCANS, SEEDS, VALIDATION, Training

ROOT = Path(__file__).resolve().parents[2]


def arm(name: str, training: Training | None = None, seed: int = 0, folder: Path = Path("arms")) -> Arm:
    return Arm(name, seed, training or Training(), Path("digits"), folder)


def flags(argv) -> dict[str, str]:
    """The `--name value` pairs of a command line, from the script on; a flag without a value maps to nothing."""
    found: dict[str, list[str]] = {}
    for word in argv[argv.index(str(SCRIPT)) + 1 :]:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        else:
            values.append(word)
    return {name: " ".join(values) for name, values in found.items()}


# the settings and the digits


def test_the_settings_count_the_scans_as_the_digits_are_split(tmp_path):
    folder = data.write_digits(tmp_path / "digits", size=8)
    counts = {split: len(list((folder / split).glob("*/*.png"))) for split in ("train", "validation")}
    assert counts == {"train": SCANS, "validation": VALIDATION}


def test_every_epoch_is_whole_for_one_worker_and_for_two():
    training = Training()
    for name in ARMS:
        one = arm(name)
        assert training.images % (training.batch * one.workers) == 0
        assert int(flags(one.train_commands()[0].argv)["--epochs"]) * one.updates_per_epoch == training.updates


def test_updates_that_are_no_whole_number_of_epochs_are_one_line():
    with pytest.raises(steps.StepError, match=r"^--updates 12 updates: must be a multiple of 8, the updates of an"):
        demo.regime(12)
    assert demo.regime(16).updates == 16
    assert demo.regime(None) == Training()


def test_each_arms_learning_rate_is_on_the_searched_grid():
    assert set(Training().lr) == set(ARMS)
    assert set(Training().lr.values()) <= set(GRID)


# the arms


def test_an_arms_folder_follows_its_own_settings_and_seed_only():
    base = Training()
    other = replace(base, lr={**base.lr, "alone": 0.7})
    for name in ("all_reduce", "codistill"):
        assert arm(name, other).folder == arm(name, base).folder
    assert arm("alone", other).folder != arm("alone", base).folder
    changes = (base, replace(base, updates=16))
    assert len({arm(name, changed, seed).folder for name in ARMS for changed in changes for seed in SEEDS}) == 30


def test_arms_differ_in_workers_epochs_peers_and_learning_rate_alone():
    own = {"--epochs", "--lr", "--output", "--experiment"}
    codistilling = {"--codistill-" + name for name in ("peers", "dir", "peer", "loss", "alpha", "burn-in")}
    commands = [flags(command.argv) for name in ARMS for command in arm(name).train_commands()]
    shared = [{key: value for key, value in command.items() if key not in own | codistilling} for command in commands]
    assert len(commands) == 4
    assert all(command == shared[0] for command in shared)
    assert {"--batch-size", "--seed", "--codistill-data-fraction", "--codistill-data-seed"} <= set(shared[0])
    assert [command["--codistill-peers"] for command in commands] == ["1", "2", "2", "1"]
    assert [int(command["--epochs"]) for command in commands] == [60, 30, 30, 30]


def test_all_reduce_is_two_workers_under_torchrun_and_nobody_else_is():
    launched = {name: "--nproc-per-node=2" in arm(name).train_commands()[0].argv for name in ARMS}
    assert launched == {"all_reduce": True, "codistill": False, "alone": False}


def test_peers_share_seed_and_exchange_and_have_a_number_and_a_save_dir_of_their_own():
    first, second = (flags(command.argv) for command in arm("codistill", seed=3).train_commands())
    assert first["--codistill-dir"] == second["--codistill-dir"]
    assert (first["--seed"], second["--seed"]) == ("3", "3")
    assert (first["--codistill-peer"], second["--codistill-peer"]) == ("0", "1")
    assert first["--experiment"] != second["--experiment"]


@pytest.mark.parametrize("name", ARMS)
def test_the_script_and_the_plug_in_understand_every_flag(name):
    from timm_codistill.options import add_arguments, codistill_config, data_config

    spec = importlib.util.spec_from_file_location("stand_in_for_the_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    add_arguments(module.parser)
    argv = arm(name).train_commands()[0].argv
    args = module.parser.parse_args(argv[argv.index(str(SCRIPT)) + 1 :])
    assert args.model_kwargs["channels"] == (16, 32, 64, 128)
    assert args.model_kwargs["pretrained_cfg_overlay"] == {"crop_pct": 1.0}
    assert codistill_config(args).peers == arm(name).members
    assert round(data_config(args).data_fraction * SCANS) == Training().images


# results

SUMMARY = """\
epoch,train_loss,train_codistill_alpha,eval_loss,eval_top1,lr
0,2.3,0.0,2.2,20.0,0.03
1,2.1,0.0,1.9,45.5,0.03
2,2.0,1.0,nan,40.25,0.02
3,2.0,1.0,1."""


def test_a_summary_gives_the_validations_by_update(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text(SUMMARY)
    seen = results.read_summary(path, updates_per_epoch=4)
    assert [(validation.update, validation.top1) for validation in seen] == [(4, 20.0), (8, 45.5), (12, 40.25)]
    assert seen[1].loss == 1.9
    assert results.best(seen) == 45.5


def test_arms_are_judged_after_the_same_updates_however_long_their_epochs(tmp_path):
    path = tmp_path / "summary.csv"
    path.write_text(SUMMARY)
    assert [found.update for found in results.read_summary(path, updates_per_epoch=4, every=8)] == [8]


def test_a_summary_that_is_not_there_yet_reads_as_no_progress(tmp_path):
    assert results.read_summary(tmp_path / "none.csv", updates_per_epoch=4) == []


def test_parameters_are_counted_without_reading_them(tmp_path):
    path = tmp_path / "init.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(()), "c": torch.zeros(5)}, path, metadata={"of": "a test"})
    assert results.parameters(path) == 18


# the report


def run(top1: float, end: float, sent: float = 100.0) -> demo.Run:
    validations = [results.Validation(8, 1.0, top1), results.Validation(16, 0.5, end)]
    return demo.Run(validations, distance=2.0, seconds=12.0, sent=sent)


def models() -> list[demo.Model]:
    return [
        demo.Model("all_reduce, 2 workers", [run(80, 79, 4000), run(90, 89, 4000)], computed=True),
        demo.Model("codistill, peer 0", [run(82, 82), run(92, 90)], computed=False),
        demo.Model("codistill, peer 1", [run(84, 84), run(92, 92)], computed=False),
        demo.Model("alone, 1 worker", [run(70, 70, 0), run(72, 72, 0)], computed=False),
    ]


def test_the_report_has_a_mean_and_a_deviation_over_seeds_and_marks_what_was_computed():
    lines = demo._report(models(), Training()).split("\n")
    assert [" ".join(line.split()) for line in lines[2:6]] == [
        "all_reduce, 2 workers 85.0 ± 7.1 84.0 ± 7.1 0.500 ± 0.000 2.00 ± 0.00 16 0:12 4,000*",
        "codistill, peer 0 87.0 ± 7.1 86.0 ± 5.7 0.500 ± 0.000 2.00 ± 0.00 16 0:12 100",
        "codistill, peer 1 88.0 ± 5.7 88.0 ± 5.7 0.500 ± 0.000 2.00 ± 0.00 16 0:12 100",
        "alone, 1 worker 71.0 ± 1.4 71.0 ± 1.4 0.500 ± 0.000 2.00 ± 0.00 16 0:12 0",
    ]


def test_the_peers_mean_is_compared_with_each_baseline_seed_by_seed():
    assert demo._paired(models()) == [
        "top-1 at end, peers' mean less all_reduce, 2 workers, seed by seed: 3.0 ± 1.4.",
        "top-1 at end, peers' mean less alone, 1 worker, seed by seed: 16.0 ± 4.2.",
    ]


def test_the_curves_are_the_mean_errors_of_all_seeds():
    curve = demo._panel(models(), Training()).curves["all_reduce, 2 workers"]
    assert (list(curve.x), list(curve.mean), curve.runs) == ([8, 16], [15.0, 16.0], 2)


def test_the_time_left_follows_from_the_pace_so_far(monkeypatch):
    now = iter([100.0, 110.0])
    monkeypatch.setattr("recipes.embedded.progress.time.monotonic", lambda: next(now))
    pace = Pace(100)
    assert [pace.left(20), pace.left(40)] == ["-:--", "0:30"]


# the entry of both halves


def finish(one: Arm) -> None:
    """Leave what a finished training of `one` leaves."""

    def build(folder):
        for member in range(one.members):
            save_dir = one.save_dir(member)
            save_dir.mkdir()
            epochs = one.training.updates // one.updates_per_epoch
            rows = [f"{epoch},2.0,{2.0 / (epoch + 1)},{50 + epoch},0.03" for epoch in range(epochs)]
            (save_dir / "summary.csv").write_text("\n".join(["epoch,train_loss,eval_loss,eval_top1,lr", *rows, ""]))
            line = {"update": one.training.updates, "distance": 1.5, "sent": 1600 if one.members > 1 else 0}
            (save_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            save_file({"weight": torch.zeros(10, 10)}, save_dir / "codistill-init.safetensors")
        return {"seconds": 7.0}

    steps.step(one.folder, one.settings, build)


def test_finished_trainings_are_reused_and_give_both_tables_and_one_picture(tmp_path, monkeypatch, capsys):
    training = Training(updates=16)
    for name in ARMS:
        for seed in SEEDS:
            finish(arm(name, training, seed, tmp_path / "vision" / "arms"))
    panel = plots.Panel({"a": plots.Curve([1], [2.0])}, "x", "y")
    monkeypatch.setattr(both.nmt, "demonstrate", lambda *_: ("the table of the other half", panel))
    monkeypatch.setattr(demo, "run_all", lambda *_, **__: pytest.fail("a training was started"))
    assert both.main(["--data", str(tmp_path), "--updates", "16"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.split("\n")]
    assert "the table of the other half" in lines
    assert "all_reduce, 2 workers 53.0 ± 0.0 53.0 ± 0.0 0.500 ± 0.000 1.50 ± 0.00 16 0:07 400*" in lines
    assert "codistill, peer 1 51.0 ± 0.0 51.0 ± 0.0 1.000 ± 0.000 1.50 ± 0.00 16 0:07 100" in lines
    assert f"validation curves: {tmp_path / 'demo.png'}" in lines
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "vision" / "demo.txt").read_text().startswith(" ")


def test_a_training_that_fails_is_one_line_that_names_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "ARMS", ("alone",))
    monkeypatch.setattr("recipes.embedded.vision.arms.SCRIPT", tmp_path / "train.py")
    assert both.main(["--only", "vision", "--data", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"demo: alone seed 0 model 0 ended with status 1: timm-codistill: {tmp_path}/train.py: no")
    assert error.endswith("train-0.log)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["-m", "recipes.embedded.vision.demo"], ["-m", "recipes.embedded.demo"]])
def test_bad_updates_are_one_line_before_anything_is_trained(tmp_path, argv):
    command = [sys.executable, *argv, "--data", str(tmp_path), "--updates", "12"]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr == "demo: --updates 12 updates: must be a multiple of 8, the updates of an epoch\n"
    assert not list(tmp_path.iterdir())


def test_another_run_in_the_same_folder_is_one_line(tmp_path, capsys):
    with steps.exclusive(tmp_path / "vision"):
        assert demo.main(["--data", str(tmp_path)]) == 1
    assert "another run is working in" in capsys.readouterr().err


def test_an_interruption_is_one_line_and_its_own_status(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demonstrate", interrupted)
    assert both.main(["--only", "vision", "--data", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "demo: interrupted; what is finished is kept, run again to go on\n"


def test_progress_shows_every_model_of_an_arm(tmp_path):
    one = arm("codistill", Training(updates=16), folder=tmp_path)
    with open(tmp_path / "out", "w+") as stream:
        watch = demo._watch(one, "[1/1]", Progress(stream, every=0.0))
        watch()
        finish(one)
        watch()
        stream.seek(0)
        assert stream.read() == "[1/1] starting\n[1/1] update 16/16, top-1 51.0, 51.0, ETA -:--\n"


def test_both_halves_count_bytes_alike():
    assert measures.ring_all_reduce_bytes(100, 2) == 400
    assert measures.sent_bytes([{"sent": None}, {"sent": 5}]) == 5


def test_a_folder_that_cannot_be_made_is_one_line(capsys):
    assert demo.main(["--data", "/proc/nowhere"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("demo: /proc/nowhere")


def test_a_value_that_is_not_finite_leaves_a_mean_that_says_so():
    assert demo.spread([1.0, math.nan], 2) == "nan"
    assert demo.spread([1.0, 2.0], 1) == "1.5 ± 0.7"
