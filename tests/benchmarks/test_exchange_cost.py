"""The question `exchange` times real exchanges, and its rows and pictures are there for every size."""

import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import exchange_background, exchange_cost, exchange_setting, record
from benchmarks.exchange_setting import Shape, scene, timed
from codistill.exchange.checkpoint.uptake import Uptake
from codistill.exchange.publisher import Publisher

SMALL = Shape(1, 16, 2)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_cost, "SHAPES", {1: SMALL})
    monkeypatch.setattr(exchange_cost, "SIZES", (1,))
    monkeypatch.setattr(exchange_cost, "ROUNDS", {1: 2})
    monkeypatch.setattr(exchange_background, "SHAPES", {exchange_background.MEGABYTES: SMALL})
    monkeypatch.setattr(exchange_background, "THREADS", 1)
    for module in (exchange_setting, exchange_background):
        monkeypatch.setattr(module, "INTERVAL", 4)
    monkeypatch.setattr(exchange_background, "PAIRS", 2)
    monkeypatch.setattr(exchange_background, "ROUNDS", 2)


def test_every_snapshot_that_is_announced_is_fetched_and_taken_up_and_ours_is_stored() -> None:
    threads = threading.active_count()
    with scene(SMALL, "cpu") as here:
        for _ in range(4):  # more than stay on the store, or in the folder of what was fetched
            here.elsewhere.prepare()
            here.fetched(here.elsewhere.announce)
            here.published(here.exchange)
            here.require_uptake()
        now = here.codistiller.metrics()
        assert now["sent"] == now["received"] == 5 * here.nbytes
        here.exchange()
        with pytest.raises(RuntimeError, match="no exchange"):
            here.require_uptake()
    assert threading.active_count() == threads


def test_what_is_timed_is_what_holds_the_training_thread() -> None:
    with (
        timed(Publisher, "publish") as out,
        timed(Uptake, "take_up") as back,
        scene(SMALL, "cpu") as here,
    ):
        began = time.perf_counter()
        here.exchange()
        took = time.perf_counter() - began
        assert 0 < out[-1] + back[-1] < took
    assert "timed" not in Publisher.publish.__qualname__


def test_the_rows_tell_of_both_halves_and_of_both_contenders_and_are_drawn_from_what_was_kept(
    short: None, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    rows = list(exchange_cost.measure("cpu"))
    assert torch.get_num_threads() == threads
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert [row.goal is not None for row in rows].count(True) == 3
    for what in ("publish", "take up"):
        assert sum(name.startswith(f"1 MB: {what}, held, of ") for name in names) == 2
    assert "1 MB: whole boundary, held / (both copies + 20 ms)" in names
    record.write(tmp_path / "exchange.json", "exchange", rows, "cpu")
    exchange_cost.draw(record.read(tmp_path / "exchange.json"), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["exchange-held.png", "exchange-interval.png"]


def test_a_size_for_which_there_is_too_little_memory_is_left_out(
    short: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exchange_cost, "available_memory", lambda: 1)
    monkeypatch.setattr(exchange_background, "measure", lambda device: iter(()))
    assert list(exchange_cost.measure("cpu")) == []
    assert "too little memory" in capsys.readouterr().err
