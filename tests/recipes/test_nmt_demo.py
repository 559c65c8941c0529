"""The demo's parts on hand-made inputs: nothing is downloaded, nothing is trained."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.embedded import steps
from recipes.embedded.nmt import data, demo, results
from recipes.embedded.nmt.arms import Arm
from recipes.embedded.nmt.settings import ARMS, GRID, Corpus, Training
from recipes.embedded.processes import Command, ProcessFailed, run_all
from recipes.embedded.progress import Progress, clock
from recipes.embedded.report import table
from recipes.embedded.steps import StepError
from tests.processes import gone

ROOT = Path(__file__).resolve().parents[2]


def write_wheel(path: Path, strings: dict[str, object]) -> Path:
    """`strings`: "component/language" -> tree of strings."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, tree in strings.items():
            component, language = name.split("/")
            place = f"homeassistant/components/{component}/translations/{language}.json"
            archive.writestr(place, json.dumps(tree, ensure_ascii=False))
    return path


def sleeper(log: Path, note: Path) -> Command:
    """A command that starts a child of its own, notes both process ids and sleeps for ten minutes."""
    code = (
        "import os, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"note = pathlib.Path({str(note)!r})\n"
        "note.with_suffix('.new').write_text(f'{os.getpid()} {child.pid}')\n"
        "os.replace(note.with_suffix('.new'), note)\n"
        "time.sleep(600)\n"
    )
    return Command("sleeper", [sys.executable, "-c", code], log)


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# the corpus


def test_strings_are_paired_by_component_and_key(tmp_path):
    wheel = write_wheel(
        tmp_path / "w.whl",
        {
            "lamp/en": {"a": {"title": "Turn it on", "only_english": "Not there yet"}, "n": 3},
            "lamp/de": {"a": {"title": "Schalte es ein"}, "n": 3},
            "oven/en": {"a": {"title": "Too hot to touch"}},
            "oven/fr": {"a": {"title": "Trop chaud"}},
            "door/en": {"a": {"title": "The  door\nis open"}},
            "door/de": {"a": {"title": "Die Tür ist offen"}},
        },
    )
    assert data.read_pairs(wheel, Corpus()) == [
        ("The door is open", "Die Tür ist offen"),
        ("Turn it on", "Schalte es ein"),
    ]


def test_a_source_is_kept_once_and_unfit_pairs_are_left_out(tmp_path):
    english = {
        "twice": "Turn it on",
        "short": "On",
        "same": "Home Assistant Cloud",
        "long": "one two three four five six seven eight nine ten eleven",
        "fits": "one two three four five six seven eight nine ten",
    }
    german = {
        "twice": "Einmal anders gesagt",
        "short": "Jetzt einschalten",
        "same": "Home Assistant Cloud",
        "long": "eins zwei",
        "fits": "eins zwei",
    }
    wheel = write_wheel(
        tmp_path / "w.whl",
        {"a/en": {"x": "Turn it on"}, "a/de": {"x": "Schalte es ein"}, "b/en": english, "b/de": german},
    )
    assert data.read_pairs(wheel, Corpus()) == [("Turn it on", "Schalte es ein"), (english["fits"], "eins zwei")]


def test_the_split_depends_on_the_seed_alone_and_shares_no_pair():
    pairs = [(f"source {number}", f"target {number}") for number in range(100)]
    corpus = Corpus(train=50, valid=20, test=10)
    parts = data.split(pairs, corpus)
    assert parts == data.split(list(pairs), corpus)
    assert parts != data.split(pairs, replace(corpus, seed=2))
    assert {name: len(part) for name, part in parts.items()} == {"train": 50, "valid": 20, "test": 10}
    assert len({pair for part in parts.values() for pair in part}) == 80


def test_too_small_a_wheel_is_one_line():
    with pytest.raises(StepError, match=r"^homeassistant-.*\.whl holds 1 usable pairs, 2700 are needed$"):
        data.split([("a b", "c d")], Corpus())


def test_without_a_network_one_line_says_what_is_missing_and_where_to_put_it(tmp_path):
    offline = {key: value for key, value in os.environ.items() if not key.upper().startswith("PIP_")}
    offline |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    argv = [sys.executable, "-m", "recipes.embedded.nmt.demo", "--data", str(tmp_path)]
    run = subprocess.run(argv, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=120)
    downloads = tmp_path / "downloads"
    assert run.returncode == 1
    assert run.stderr == (
        "demo: could not fetch homeassistant==2026.11.0 from the package index "
        f"(pip's words are in {downloads}/pip.log): connect to a network, "
        f"or put homeassistant-2026.11.0-py3-none-any.whl into {downloads}, and run again\n"
    )


def test_a_wheel_that_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    wheel = write_wheel(tmp_path / Corpus().wheel, {"a/en": {}})
    assert data.fetch(Corpus(), tmp_path) == wheel
    assert not (tmp_path / "pip.log").exists()


# steps that are done once


def test_a_finished_step_is_reused_and_other_settings_build_it_again(tmp_path):
    built = []

    def build(folder):
        built.append(sorted(entry.name for entry in folder.iterdir()))
        (folder / "made").touch()
        return {"seconds": 1.5}

    folder = tmp_path / "step"
    assert steps.step(folder, {"a": 1}, build) == {"seconds": 1.5}
    assert steps.step(folder, {"a": 1}, build) == {"seconds": 1.5}
    assert built == [[]]
    steps.step(folder, {"a": 2}, build)
    assert built == [[], []]


def test_an_interrupted_step_starts_again_from_an_empty_folder(tmp_path):
    def interrupted(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    folder = tmp_path / "step"
    with pytest.raises(KeyboardInterrupt):
        steps.step(folder, {}, interrupted)
    assert steps.finished(folder, {}) is None
    steps.step(folder, {}, lambda place: {"empty": not list(place.iterdir())})
    assert steps.finished(folder, {}) == {"empty": True}


@pytest.mark.parametrize("mark", ["", "{", "[]", '{"digest": 1}', '{"facts": {}}'])
def test_a_damaged_mark_counts_as_unfinished(tmp_path, mark):
    (tmp_path / steps.MARK).write_text(mark)
    assert steps.finished(tmp_path, {}) is None


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        steps.exclusive(tmp_path),
        pytest.raises(StepError, match="another run is working in"),
        steps.exclusive(tmp_path),
    ):
        pass
    with steps.exclusive(tmp_path):
        pass


# the arms


def arm(name: str, training: Training | None = None) -> Arm:
    return Arm(name, Corpus(), training or Training(), Path("corpus"), Path("arms"))


def test_an_arms_folder_follows_its_own_settings_only():
    base = Training()
    other_dropout = replace(base, dropout={**base.dropout, "alone": 0.7})
    for name in ("all_reduce", "codistill"):
        assert arm(name, other_dropout).folder == arm(name, base).folder
    assert arm("alone", other_dropout).folder != arm("alone", base).folder
    assert len({arm(name, changed).folder for name in ARMS for changed in (base, replace(base, updates=7))}) == 6


def test_each_arms_dropout_is_on_the_searched_grid():
    assert set(Training().dropout) == set(ARMS)
    assert set(Training().dropout.values()) <= set(GRID)


def flags(argv) -> dict[str, str]:
    """The `--name value` pairs of a command line; a flag without a value maps to an empty string."""
    values = [*argv[1:], "--"]
    return {a: "" if b.startswith("--") else b for a, b in zip(argv, values, strict=True) if a.startswith("--")}


def test_arms_differ_in_workers_peers_and_dropout_alone():
    own = {"--dropout", "--seed", "--save-dir", "--device-id", "--ddp-backend"}
    commands = [flags(command.argv) for name in ARMS for command in arm(name).train_commands()]
    assert len(commands) == 5
    shared = [
        {
            key: value
            for key, value in command.items()
            if key not in own and "codistill-" not in key and "distributed" not in key
        }
        for command in commands
    ]
    assert all(command == shared[0] for command in shared)
    assert [command["--codistill-peers"] for command in commands] == ["1", "1", "2", "2", "1"]
    assert [command["--distributed-world-size"] for command in commands] == ["2", "2", "1", "1", "1"]


def test_peers_have_their_own_seed_and_save_dir_and_one_exchange():
    first, second = (flags(command.argv) for command in arm("codistill").train_commands())
    assert first["--codistill-dir"] == second["--codistill-dir"]
    assert (first["--codistill-peer"], second["--codistill-peer"]) == ("0", "1")
    for name in ("--seed", "--save-dir"):
        assert first[name] != second[name]


# results

LOG = """\
00:00:00 | INFO | fairseq_cli.train | num. shared model params: 788,480 (num. trained: 788,470)
00:00:00 | INFO | fairseq_cli.train | num. expert model params: 0 (num. trained: 0)
00:00:01 | INFO | train_inner | {"epoch": 1, "loss": "8", "nll_loss": "7.9", "num_updates": "20"}
00:00:02 | INFO | valid | {"epoch": 2, "valid_loss": "7", "valid_nll_loss": "6.541", "valid_num_updates": "100"}
00:00:03 | INFO | valid | {"epoch": 3, "valid_loss": "7", "valid_nll_loss": "6.25", "valid_num_updates": "200"}
00:00:04 | INFO | valid | {"epoch": 4, "valid_loss": "7", "valid_nll_loss": "6.5", "valid_num_updates": "300"}
00:00:04 | INFO | train | {"epoch": 4, "train_loss": "7", "train_num_updates": "300", "train_wall": "9"}
00:00:05 | INFO | train_inner | {"epoch": 5, "loss": "7", "num_upd"""


def test_a_log_gives_the_validation_curve_its_best_and_its_end(tmp_path):
    path = tmp_path / "train.log"
    path.write_text(LOG)
    log = results.read_log(path)
    assert log.valid == [(100, 6.541), (200, 6.25), (300, 6.5)]
    assert (log.best, log.end, log.update, log.parameters) == ((200, 6.25), 6.5, 300, 788470)


def test_a_log_that_is_not_there_yet_reads_as_no_progress(tmp_path):
    log = results.read_log(tmp_path / "none.log")
    assert (log.update, list(log.valid), log.parameters) == (0, [], 0)


def test_metrics_give_the_last_distance_and_all_bytes_sent(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"update": 1, "distance": null, "sent": 0}\n{"update": 2, "distance": 1.5, "sent": 30}\n{"upd',
        encoding="utf-8",
    )
    rows = results.read_metrics(path)
    assert results.distance(rows) == 1.5
    assert results.sent_bytes(rows) == 30
    assert results.sent_bytes([{"update": 1}]) == 0


def test_a_ring_of_two_sends_every_gradient_once_and_of_four_one_and_a_half_times():
    assert results.ring_all_reduce_bytes(1000, 2) == 4000
    assert results.ring_all_reduce_bytes(1000, 4) == 6000


def test_translations_come_back_in_the_order_of_the_test_set(tmp_path):
    path = tmp_path / "generate.txt"
    path.write_text(
        "S-1\tx\nH-1\t-0.5\t▁x\nD-1\t-0.5\tzwei Türen\nD-10\t-0.1\tdrei\nD-0\t-0.2\teins\n2026 | INFO | D-9\n"
    )
    assert results.read_hypotheses(path) == ["eins", "zwei Türen", "drei"]


def test_bleu_is_a_hundred_for_the_references_and_refuses_a_missing_translation():
    lines = ["Die Tür ist offen.", "Das Licht in der Küche ist an."]
    assert results.bleu(lines, lines) == pytest.approx(100.0)
    with pytest.raises(ValueError, match="1 translations for 2 references"):
        results.bleu(lines[:1], lines)


# the report


def model(name: str, best: float, sent: float, *, computed: bool = False) -> demo.Model:
    training = results.Training(300, [(100, 7.0), (200, best), (300, best + 0.25)], 1000)
    return demo.Model(name, training, 12.34, 5.678, 61.0, sent, computed)


def test_a_table_lines_up_its_columns():
    assert table(("", "one"), [["a", "1"], ["long name", "1,000"]]).split("\n") == [
        "             one",
        "---------  -----",
        "a              1",
        "long name  1,000",
    ]
    with pytest.raises(ValueError, match="one cell for each column"):
        table(("a", "b"), [["1"]])


def test_the_report_has_both_peers_their_mean_and_marks_what_was_computed():
    models = [
        model("all_reduce, 2 workers", 5.0, 4000, computed=True),
        model("codistill, peer 0", 5.0, 200),
        model("codistill, peer 1", 6.0, 400),
        model("alone, 1 worker", 6.5, 0),
    ]
    lines = demo._report(models, Training()).split("\n")
    assert [" ".join(line.split()) for line in lines[2:7]] == [
        "all_reduce, 2 workers 5.000 200 5.250 12.3 5.68 300 1:01 4,000*",
        "codistill, peer 0 5.000 200 5.250 12.3 5.68 300 1:01 200",
        "codistill, peer 1 6.000 200 6.250 12.3 5.68 300 1:01 400",
        "codistill, mean 5.500 5.750 12.3 5.68 300",
        "alone, 1 worker 6.500 200 6.750 12.3 5.68 300 1:01 0",
    ]


def test_progress_in_a_file_is_a_line_now_and_then(tmp_path):
    with open(tmp_path / "out", "w+") as stream:
        progress = Progress(stream, every=3600.0)
        progress.say("begin")
        for number in range(3):
            progress.show(f"update {number}")
        progress.say("end")
        stream.seek(0)
        assert stream.read() == "begin\nupdate 0\nend\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (-1, "0:00")])
def test_seconds_read_as_a_clock(seconds, text):
    assert clock(seconds) == text


# child processes


def test_a_failing_child_ends_the_others_and_its_last_words_are_reported(tmp_path):
    note = tmp_path / "note"
    code = f"import os, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.02)\n"
    code += "print('no luck')\nraise SystemExit(3)"
    failing = Command("failing", [sys.executable, "-c", code], tmp_path / "failing.log")
    with pytest.raises(ProcessFailed, match=r"^failing ended with status 3: no luck \(log: .*failing\.log\)$"):
        run_all([sleeper(tmp_path / "sleeper.log", note), failing], limit=60.0)
    for pid in note.read_text().split():
        wait_for(lambda pid=int(pid): gone(pid))


def test_the_time_limit_ends_every_child(tmp_path):
    note = tmp_path / "note"
    with pytest.raises(ProcessFailed, match="sleeper: not done in the time allowed"):
        run_all([sleeper(tmp_path / "sleeper.log", note)], limit=5.0)
    for pid in note.read_text().split():
        wait_for(lambda pid=int(pid): gone(pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_process_behind(tmp_path, number):
    note = tmp_path / "note"
    command = sleeper(tmp_path / "sleeper.log", note)
    code = (
        "import pathlib\n"
        "from recipes.embedded.processes import Command, run_all\n"
        f"run_all([Command('sleeper', {list(command.argv)!r}, pathlib.Path({str(command.log)!r}))], limit=60.0)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(note.exists)
        runner.send_signal(number)
        _, errors = runner.communicate(timeout=30)
    finally:
        runner.kill()
    assert "KeyboardInterrupt" in errors
    for pid in note.read_text().split():
        wait_for(lambda pid=int(pid): gone(pid))


def test_a_second_interruption_leaves_no_process_behind_either(tmp_path):
    note = tmp_path / "note"
    stubborn = (
        "import os, pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", stubborn]
    code = (
        "import pathlib\n"
        "from recipes.embedded.processes import Command, run_all\n"
        f"run_all([Command('stubborn', {command!r}, pathlib.Path({str(tmp_path / 'log')!r}))], limit=60.0)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: note.exists() and note.read_text())
        runner.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        runner.send_signal(signal.SIGTERM)
        runner.wait(timeout=30)
    finally:
        runner.kill()
    wait_for(lambda: gone(int(note.read_text())))


def test_what_a_killed_run_left_running_keeps_the_next_one_out(tmp_path):
    note = tmp_path / "note"
    command = sleeper(tmp_path / "sleeper.log", note)
    code = (
        "import pathlib\n"
        "from recipes.embedded.processes import Command, run_all\n"
        "from recipes.embedded.steps import exclusive\n"
        f"with exclusive(pathlib.Path({str(tmp_path)!r})):\n"
        f"    run_all([Command('sleeper', {list(command.argv)!r}, pathlib.Path({str(command.log)!r}))], limit=60.0)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(note.exists)
    runner.kill()
    runner.wait()
    pids = [int(pid) for pid in note.read_text().split()]
    try:
        with pytest.raises(StepError, match="another run is working in"), steps.exclusive(tmp_path):
            pass
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_for(lambda pid=pid: gone(pid))
    with steps.exclusive(tmp_path):
        pass
