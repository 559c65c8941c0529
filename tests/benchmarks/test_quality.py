"""Curves become times to a target by the rule that the page states; a training is done, judged and remembered."""

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import quality, quality_tasks, quality_training
from benchmarks.quality import Run, reached, rows, target
from benchmarks.quality_training import Trial, mean, train


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder of these tests' own, with the digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality_tasks, "DATA", tmp_path_factory.mktemp("data"))
        quality_tasks.Digits().prepare()
        yield quality_tasks.DATA


def run_of(*quality_at_looks: float, pace: float = 10.0) -> Run:
    return Run([pace * number for number in range(len(quality_at_looks))], quality_at_looks)


def test_the_target_is_nearly_all_of_the_way_that_the_reference_goes() -> None:
    assert target(run_of(90.0, 5.0, 10.0), way=0.75) == 30.0  # to its end, not to its best


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        ((80.0, 60.0, 20.0), 17.5),  # straight between two looks
        ((80.0, 30.0, 50.0, 20.0), 10.0),  # the first time counts, though it does not last
        ((30.0, 80.0), 0.0),
        ((80.0, 30.1, 30.2), None),
    ],
)
def test_a_target_is_reached_where_the_curve_first_gets_there(looks: Sequence[float], seconds: float | None) -> None:
    assert reached(run_of(*looks), 30.0) == seconds


def test_a_method_that_misses_the_target_with_one_seed_has_no_time_but_says_so() -> None:
    found = {
        "ddp": [run_of(100.0, 10.0), run_of(100.0, 20.0)],
        "powersgd": [run_of(100.0, 10.0, pace=5.0), run_of(100.0, 10.0, pace=5.0)],
        "alone": [run_of(100.0, 10.0, pace=1.0), run_of(100.0, 40.0, pace=1.0)],
    }
    by_name = {row.name: row for row in rows("digits", found)}
    assert by_name["digits: powersgd / ddp, time to target"].ratio == pytest.approx(0.475, abs=0.03)
    assert "digits: alone / ddp, time to target" not in by_name
    end = by_name["digits: alone / ddp, at the end"]
    assert (end.ratio, end.details["reached"]) == (1.5, "1 of 2")
    assert by_name["digits: powersgd / ddp, at the end"].details["reached"] == "2 of 2"


def test_the_picture_is_drawn_from_rows_alone(tmp_path: Path) -> None:
    found = {method: [run_of(90.0, 20.0, 8.0 + seed) for seed in range(3)] for method in ("ddp", "checkpoint")}
    quality.draw(list(rows("digits", found)), tmp_path)
    assert (tmp_path / "quality-time.png").stat().st_size > 10_000


def test_a_mean_of_workers_takes_their_statistics_and_leaves_counters() -> None:
    states = [{"weight": torch.tensor([value]), "count": torch.tensor(3)} for value in (1.0, 2.0)]
    assert mean(states) == {"weight": torch.tensor([1.5]), "count": torch.tensor(3)}


def test_data_parallel_workers_share_out_what_one_worker_goes_through(prepared: Path) -> None:
    whole, first, second = (quality_tasks.Digits().batches(1, 0, *shard) for shard in ((0, 1), (0, 2), (1, 2)))
    for number in range(10):
        for half, place in ((first, 2 * number), (second, 2 * number + 1)):
            assert torch.equal(half[number].inputs[0], whole[place].inputs[0])
    other = quality_tasks.Digits().batches(1, 1, 0, 1)  # the order of another peer
    assert not torch.equal(other[0].inputs[0], whole[0].inputs[0])


def test_two_methods_train_side_by_side_and_are_judged_and_remembered(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for method, models in (("ddp", 1), ("checkpoint", 2)):
        trial = Trial("digits", method, seed=3, lr=0.05, part="tuning", updates=5, options={"period": 2})
        found[method] = train(trial)
        assert [model["update"] for model in found[method]["models"]] == models * [[0, 5]]
        assert all(0 <= error <= 100 for model in found[method]["models"] for error in model["quality"])
        assert not list(trial.folder.glob("looks-*"))
        with monkeypatch.context() as without:
            without.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
            without.setattr(quality_training, "judge", lambda *_: pytest.fail("judged again"))
            assert train(trial) == found[method]
    runs = {method: [Run.of(each)] for method, each in found.items()}
    assert runs["checkpoint"][0].seconds[-1] > 0
    assert "digits: checkpoint / ddp, at the end" in {row.name for row in rows("digits", runs)}
