"""Reading what trainings wrote: hosts' own formats (written by the hosts themselves), resumes, kills, rubbish."""

import json
import math
import os
import subprocess
import sys

import pytest

from codistill import curves, meters
from codistill.curves import NoCurve, read

# The hosts' own writers, called as their training scripts call them: two epochs of 4 updates, a line every 2.
HOSTS = """
import importlib.util, logging, sys, types
from pathlib import Path

for package in ("fairseq", "timm", "timm.utils"):  # without what they load, which takes many seconds
    bare = types.ModuleType(package)
    bare.__path__ = importlib.util.find_spec(package).submodule_search_locations
    sys.modules[package] = bare
from fairseq.logging import progress_bar
from timm.utils.summary import update_summary

folder = Path(sys.argv[1])
formatter = logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S")
logging.getLogger().setLevel(logging.INFO)
for kind in ("json", "simple"):
    printed = logging.FileHandler(folder / f"printed-{kind}.log")
    printed.setFormatter(formatter)
    logging.getLogger().addHandler(printed)
    before = list(progress_bar.logger.handlers)
    for epoch in (1, 2):
        file = str(folder / f"file-{kind}.log")
        bar = progress_bar.progress_bar(range(4), log_format=kind, log_file=file, log_interval=2, epoch=epoch)
        for batch in bar:
            update = 4 * (epoch - 1) + batch + 1
            if update % 2 == 0:
                stats = {"loss": 10.0 - update, "codistill_distance": update / 2, "num_updates": update}
                stats["wall"] = update + 1
                bar.log(stats, tag="train_inner", step=update)
        valid = progress_bar.progress_bar(range(1), log_format=kind, epoch=epoch, prefix="valid on 'valid' subset")
        valid.print({"loss": 20.0 - update, "num_updates": update}, tag="valid", step=update)
        bar.print({"loss": 11.0 - update, "num_updates": update, "wall": update + 1}, tag="train", step=update)
    logging.getLogger().removeHandler(printed)
    for handler in set(progress_bar.logger.handlers) - set(before):
        progress_bar.logger.removeHandler(handler)
for epoch in (0, 1):
    update_summary(
        epoch, {"loss": 2.0 - epoch}, {"loss": 3.0 - epoch, "top1": 50.0 + epoch}, folder / "summary.csv", lr=0.1,
        write_header=epoch == 0,
    )
"""
LOGS = ["printed-json.log", "printed-simple.log", "file-json.log", "file-simple.log"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts")
    command = [sys.executable, "-c", HOSTS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def metrics(folder, *records, name="metrics.jsonl"):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def inner(update, wall, **more):
    """A line within an epoch, as fairseq prints it."""
    entry = {
        "epoch": 1,
        "update": update / 100,
        "loss": str(update),
        "num_updates": str(update),
        "wall": str(wall),
        **more,
    }
    return f"2026-11-26 00:04:19 | INFO | train_inner | {json.dumps(entry)}\n"


def valid(update, loss):
    entry = {"epoch": 1, "valid_loss": str(loss), "valid_num_updates": str(update)}
    return f"2026-11-26 00:04:22 | INFO | valid | {json.dumps(entry)}\n"


def test_the_name_of_our_metrics_file_is_the_one_that_is_written():
    assert curves.METRICS_FILE == meters.METRICS_FILE


@pytest.mark.parametrize("log", LOGS)
def test_every_format_of_fairseqs_log_gives_the_same_curves(hosts, log):
    run = read(hosts / log)
    assert run.curve("train_loss") == [(2, 8.0), (4, 6.0), (6, 4.0), (8, 2.0)]
    assert run.curve("train_loss", "epochs") == [(0.5, 8.0), (1, 6.0), (1.5, 4.0), (2, 2.0)]
    assert run.curve("train_loss", "time") == [(3, 8.0), (5, 6.0), (7, 4.0), (9, 2.0)]
    assert run.curve("distance") == [(2, 1.0), (4, 2.0), (6, 3.0), (8, 4.0)]
    assert run.curve("valid_loss") == [(4, 16.0), (8, 12.0)]
    assert run.curve("valid_loss", "time") == [(5, 16.0), (9, 12.0)]


def test_without_lines_within_an_epoch_those_at_its_end_are_taken(hosts, tmp_path):
    text = (hosts / "printed-simple.log").read_text()
    log = tmp_path / "train.log"
    log.write_text("".join(line for line in text.splitlines(keepends=True) if "train_inner" not in line))
    assert read(log).curve("train_loss", "epochs") == [(1, 7.0), (2, 3.0)]
    assert read(tmp_path).curve("valid_loss", "epochs") == [(1, 16.0), (2, 12.0)]


def test_timms_epochs_become_updates_and_seconds_by_our_metrics_file(hosts, tmp_path):
    run = metrics(
        tmp_path / "run",
        {"update": 3, "epoch": 1, "distance": 1.5, "wall": 6.0},
        {"update": 6, "epoch": 2, "distance": 2.5, "wall": 12.0},
        {"update": 10, "epoch": 2, "distance": 3.5, "wall": 20.0},
    )
    (run / "summary.csv").write_bytes((hosts / "summary.csv").read_bytes())
    assert read(run).curve("valid_top1") == [(5, 50.0), (10, 51.0)]
    assert read(run).curve("train_loss", "epochs") == [(1, 2.0), (2, 1.0)]
    assert read(run).curve("valid_loss", "time") == [(10, 3.0), (20, 2.0)]
    epochs, distances = zip(*read(run).curve("distance", "epochs"), strict=True)
    assert epochs == pytest.approx((0.6, 1.2, 2.0))
    assert distances == (1.5, 2.5, 3.5)


def test_the_length_of_an_epoch_is_the_least_that_a_run_under_way_allows(tmp_path):
    """125 updates of the last epoch, which ended early, are no whole epoch: 1880 / 15 says 126."""
    records = ({"update": update, "epoch": epoch, "gap": 1} for update, epoch in ((1880, 15), (2000, 16)))
    _, (epochs, _) = read(metrics(tmp_path / "run", *records)).curve("gap", "epochs")
    assert epochs == pytest.approx(2000 / 126)


def test_a_plain_timm_run_has_epochs_only_and_says_so(hosts):
    run = read(hosts / "summary.csv")
    assert run.curve("valid_loss", "epochs") == [(1, 3.0), (2, 2.0)]
    with pytest.raises(NoCurve) as caught:
        run.curve("valid_loss")
    assert str(caught.value) == (
        f"{hosts / 'summary.csv'} cannot show valid_loss against updates: the updates of an epoch can be told by a "
        "fairseq log, or a metrics.jsonl of more than one epoch"
    )


def test_our_own_writer_is_read_back_with_its_clock_and_what_is_not_finite(tmp_path):
    file = meters.MetricsFile(tmp_path, meters.Incidents(fatal=False))
    file.write({"update": 10, "epoch": 1, "loss": 0.5, "distance": math.nan})
    file.write({"update": 20, "epoch": 1, "loss": 0.25, "distance": 2.0})
    run = read(tmp_path)
    assert run.keys == ["distance", "loss", "wall"]
    assert run.curve("loss") == [(10, 0.5), (20, 0.25)]
    (first, y), second = run.curve("distance")
    assert (first, second) == (10, (20, 2.0))
    assert math.isnan(y)
    (began, _), (ended, _) = run.curve("loss", "time")
    assert 0 <= began <= ended < 60


def test_a_missing_key_is_named_with_those_that_are_there(tmp_path):
    run = read(metrics(tmp_path / "run", {"update": 1, "epoch": 1, "loss": 0.5, "gap": 3}))
    with pytest.raises(NoCurve) as caught:
        run.curve("staleness")
    assert str(caught.value) == f"{tmp_path / 'run'} has no staleness; it has gap, loss"


def test_the_penalty_of_a_host_log_is_not_taken_for_that_of_our_file(tmp_path):
    (tmp_path / "train.log").write_text(inner(10, 1, codistill_loss="0.9"))
    assert read(tmp_path).curve("train_codistill_loss") == [(10, 0.9)]
    with pytest.raises(NoCurve, match="has no loss; it has train_codistill_loss, train_loss, train_wall"):
        read(tmp_path).curve("loss")


def test_after_a_resume_the_later_updates_count_and_counters_and_the_clock_go_on(tmp_path):
    first = [(10, 5.0, 100), (20, 10.0, 200), (30, 15.0, 300)]
    second = [(20, 3.0, 10), (30, 6.0, 20), (40, 9.0, 30)]  # from a checkpoint of update 20
    records = [{"update": u, "epoch": 1, "wall": w, "sent": s, "distance": s / 10} for u, w, s in (*first, *second)]
    run = read(metrics(tmp_path / "run", *records))
    assert run.curve("distance") == [(10, 10.0), (20, 1.0), (30, 2.0), (40, 3.0)]
    assert run.curve("sent") == [(10, 100), (20, 310), (30, 320), (40, 330)]
    assert run.curve("distance", "time") == [(5, 10.0), (18, 1.0), (21, 2.0), (24, 3.0)]


def test_a_process_is_told_from_the_one_before_though_no_counter_of_it_is_behind(tmp_path):
    lines = [
        {"update": 500, "epoch": 1, "distance": 1.0, "wall": 100.0, "started": 1e9},
        {"update": 1000, "epoch": 1, "distance": 2.0, "wall": 104.0, "started": 1e9 + 300},
        {"update": 1500, "epoch": 1, "distance": 3.0, "wall": 200.0, "started": 1e9 + 300},
    ]
    run = read(metrics(tmp_path / "run", *lines))
    assert run.curve("distance", "time") == [(100, 1.0), (204, 2.0), (300, 3.0)]
    assert run.keys == ["distance", "wall"]


def test_a_resume_in_a_second_log_replaces_validations_it_has_not_come_to_yet(tmp_path):
    (tmp_path / "b.log").write_text(inner(50, 5) + inner(100, 10) + valid(100, 3.0) + inner(150, 15) + valid(150, 2.0))
    (tmp_path / "a.log").write_text(inner(125, 4))
    for age, name in ((20, "b.log"), (10, "a.log")):
        stamp = 1_000_000_000 - age
        os.utime(tmp_path / name, (stamp, stamp))
    run = read(tmp_path)
    assert run.curve("train_loss", "time") == [(5, 50.0), (10, 100.0), (19, 125.0)]
    assert run.curve("valid_loss") == [(100, 3.0)]


def test_the_clock_of_a_fairseq_log_that_stands_still_is_told_and_that_of_our_file_goes_before_it(tmp_path):
    """As fairseq 0.12.3 does after a resume within an epoch: wall stays 0."""
    log = tmp_path / "train.log"
    log.write_text(inner(10, 5) + inner(20, 9) + valid(25, 1.0))
    assert read(tmp_path).curve("valid_loss", "time") == [(9 * 25 / 20, 1.0)]
    log.write_text(inner(10, 5) + inner(20, 9) + inner(30, 0) + inner(40, 0))
    with pytest.raises(NoCurve) as caught:
        read(tmp_path).curve("train_loss", "time")
    assert str(caught.value) == (
        f"{tmp_path} cannot show train_loss against time: fairseq's clock stands still at update 20, after a resume "
        "within an epoch"
    )
    metrics(tmp_path, *({"update": u, "epoch": 1, "wall": w} for u, w in ((10, 1.0), (20, 2.0), (30, 0.5), (40, 1.5))))
    assert read(tmp_path).curve("train_loss", "time") == [(1, 10), (2, 20), (2.5, 30), (3.5, 40)]


def test_our_own_keys_come_from_our_file_before_the_hosts_and_a_training_loss_from_within_epochs(tmp_path):
    end = '{"epoch": 1, "train_loss": "7", "valid_num_updates": "20", "gap": 7}\n'
    (tmp_path / "train.log").write_text(end.replace("valid", "train") + inner(30, 5) + end.replace("20", "30"))
    metrics(tmp_path, {"update": 20, "epoch": 1, "gap": 1})
    assert read(tmp_path).curve("train_loss") == [(30, 30.0)]
    assert read(tmp_path).curve("gap") == [(20, 1.0)]


def test_several_logs_from_the_start_are_not_mixed(tmp_path):
    for name in ("0.log", "1.log"):
        (tmp_path / name).write_text(inner(10, 1))
    with pytest.raises(NoCurve, match=r"has several logs from the start \(.*\.log, .*\.log\); name one of them"):
        read(tmp_path)


def test_a_resumed_summary_writes_its_header_again(tmp_path):
    (tmp_path / "summary.csv").write_text(
        "epoch,train_loss,eval_loss\n0,3.0,4.0\n1,2.0,3.0\n2,1.9,2.9\n"
        "epoch,train_loss,eval_loss,lr\n1,2.5,3.5,0.1\n"  # killed in the next epoch
    )
    assert read(tmp_path).curve("valid_loss", "epochs") == [(1, 4.0), (2, 3.5)]
    assert read(tmp_path).curve("lr", "epochs") == [(2, 0.1)]


DURING = "epoch 001:     {} / 50 codistill_distance=1.{}, num_updates={}"
RECORD = '{{"update": {}, "epoch": 1, "distance": 1.{}}}'


@pytest.mark.parametrize(
    ("name", "line"), [("metrics.jsonl", RECORD), ("train.log", DURING), ("summary.csv", "{},1.{}")]
)
def test_a_line_that_is_not_whole_yet_does_not_count(tmp_path, name, line):
    header = "epoch,train_codistill_distance\n" if name == "summary.csv" else ""
    (tmp_path / name).write_text(header + line.format(10, 5, 10) + "\n" + line.format(20, 2, 20))
    against = "epochs" if header else "updates"
    assert read(tmp_path).curve("distance", against) == [(11 if header else 10, 1.5)]


def test_lines_that_cannot_be_read_are_passed_over(tmp_path):
    good = '{"update": %d, "epoch": 1, "gap": 1}\n'
    rubbish = [
        '{"update": 15, "ep' + good % 20,
        "null\n",
        "[1]\n",
        "\n",
        "{}\n",
        '{"update": true, "gap": 2}\n',
        "[" * 100_000,
    ]
    (tmp_path / "metrics.jsonl").write_text(good % 10 + "".join(rubbish) + "\n" + good % 30)
    assert read(tmp_path).curve("gap") == [(10, 1), (30, 1)]
    (tmp_path / "train.log").write_bytes(b"\xff\x00 epoch 1 | loss\n" + inner(10, 1, gnorm=None, lr="many").encode())
    assert read(tmp_path / "train.log").keys == ["train_gnorm", "train_loss", "train_wall"]
    (tmp_path / "summary.csv").write_text('epoch,loss\n0,1.0\n1\n2,"\x00\n3,2.0,5\nx,1.0\n4,3.0\n')
    assert read(tmp_path / "summary.csv").curve("loss", "epochs") == [(1, 1.0), (5, 3.0)]


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "other.log").write_text("nothing of interest\n")
    reason = "is not a run: no numbers in a metrics.jsonl, a summary.csv or a fairseq log (*.log)"
    for path in (tmp_path, tmp_path / "metrics.jsonl", tmp_path / "other.log"):
        with pytest.raises(NoCurve) as caught:
            read(path)
        assert str(caught.value) == f"{path} {reason}"
    with pytest.raises(NoCurve, match="missing cannot be read: No such file or directory"):
        read(tmp_path / "missing")
