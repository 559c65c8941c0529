"""The fuzzer's targets for a moment without it, and what it finds and says when something is wrong."""

import importlib.util
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codistill.exchange.errors import Refused
from tests.faults import fuzz
from tests.faults.fuzz_targets import CAUSES, Target, mutate, outcome, targets


@pytest.mark.parametrize("name", fuzz.NAMES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), changes=st.integers(1, 4), flips=st.integers(0, 1))
def test_mutated_input_is_refused_for_a_documented_cause_or_means_the_same_when_written_again(
    tmp_path, name, seed, changes, flips
):
    target = targets(tmp_path)[name]
    draw = random.Random(seed)
    data = draw.choice(target.seeds())
    for _ in range(changes):
        data = mutate(target, data, draw.randrange(2**32)) or data
    for _ in range(flips):
        place = draw.randrange(len(data))
        data = data[:place] + draw.randbytes(1) + data[place + 1 :]
    outcome(target, data)


@pytest.mark.parametrize("name", fuzz.NAMES)
@given(data=st.binary(max_size=200))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_for_a_documented_cause_or_mean_the_same_when_written_again(tmp_path, name, data):
    outcome(targets(tmp_path)[name], data)


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_every_target_accepts_a_seed_and_mutations_reach_beyond_the_parser(tmp_path, name):
    target = targets(tmp_path)[name]
    seeds = target.seeds()
    assert "accepted" in {outcome(target, seed) for seed in seeds}
    if target.split is not None:
        changed = [mutate(target, seeds[-1], number) for number in range(300)]
        assert len({outcome(target, data) for data in changed if data is not None}) > 1
        assert all(len(data) <= target.longest for data in seeds)


def test_the_names_and_the_causes_are_those_of_the_code(tmp_path):
    assert tuple(targets(tmp_path)) == fuzz.NAMES
    assert {"size", "format", "rollback", "non-finite"} <= CAUSES


def refuse(cause, message):
    def read(data):
        raise Refused(cause, message)

    return read


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda data: data[99], IndexError),
        (refuse("mood", "not today"), AssertionError),
        (refuse("format", "two\nlines"), AssertionError),
        (refuse("format", "x" * 501), AssertionError),
        (lambda data: data + b"!", AssertionError),
    ],
    ids=["another exception", "another cause", "two lines", "a long line", "another meaning"],
)
def test_what_breaks_the_property_is_a_finding(read, error):
    with pytest.raises(error):
        outcome(Target(read, lambda value: value, list, 100), b"data")


def test_without_atheris_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fuzz.main([]) == 2
    assert capsys.readouterr().err == (
        "fuzz: atheris is not installed here; pip install atheris (Linux, Python 3.11 to 3.13)\n"
    )


def test_an_unknown_target_is_named_with_what_is_allowed(capsys):
    with pytest.raises(SystemExit):
        fuzz.main(["snapshots"])
    assert "TARGET snapshots: one of strict_json, manifest," in capsys.readouterr().err


def test_a_written_input_can_be_read_again(tmp_path, capsys):
    (tmp_path / "input").write_bytes(b"[]")
    assert fuzz.main(["--input", str(tmp_path / "input"), "manifest", "snapshot"]) == 0
    assert capsys.readouterr().out == "manifest: format\nsnapshot: size\n"


def test_a_finding_is_told_with_its_input():
    log = "=== Uncaught Python exception: ===\nKeyError: 'a'\nTraceback\nTest unit written to /somewhere/crash-1\n"
    assert fuzz._finding(77, log) == "KeyError: 'a'\n  input: /somewhere/crash-1"
    assert "ended with status -9" in fuzz._finding(-9, "")


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_the_fuzzer_runs_reports_executions_and_keeps_what_it_found(tmp_path, capsys):
    assert fuzz.main(["--seconds", "2", "--folder", str(tmp_path), "proposal"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("proposal"))
    assert int(row.split()[1].replace(",", "")) > 100
    assert (tmp_path / "proposal" / "corpus" / "seed-0").exists()
