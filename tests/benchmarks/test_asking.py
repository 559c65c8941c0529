"""`make bench` asks one question after the other; none leaves anything to the next, whichever way it ends."""

import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks.record import Row, path_of, write

ENDLESS = """
import sys, tempfile, time, types
from benchmarks import __main__ as bench

def measure(device):
    folder = tempfile.mkdtemp()  # as of a process that was killed
    print("in", folder, flush=True)
    time.sleep(300)
    yield

question = types.ModuleType("benchmarks.endless", "How long?")
question.measure = measure
sys.modules[question.__name__] = question
bench.QUESTIONS["endless"] = "endless"
sys.argv = ["bench", "endless"]
sys.exit(bench.main())
"""


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    """A question of which `ratio` is the answer, and `place` where it left a file."""
    module = types.ModuleType("benchmarks.tiny", "How much?")

    def measure(device: str) -> Iterator[Row]:
        torch.set_num_threads(3)
        module.place = tempfile.mkdtemp()
        yield Row.of("tiny", [module.ratio])

    module.measure, module.ratio, module.TOLERANCE = measure, 1.0, 0.1
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(bench, "QUESTIONS", {"tiny": "tiny"})
    monkeypatch.setattr(bench, "KEPT", tmp_path / "kept")
    before = signal.getsignal(signal.SIGTERM)
    yield module
    signal.signal(signal.SIGTERM, before)


def test_a_question_leaves_neither_files_nor_its_number_of_threads(question: types.ModuleType, tmp_path: Path) -> None:
    threads, folder = torch.get_num_threads(), tempfile.gettempdir()
    assert [row.name for row in bench.ask("tiny", "cpu", tmp_path / "out")] == ["tiny"]
    assert (torch.get_num_threads(), tempfile.gettempdir()) == (threads, folder)
    assert not Path(question.place).exists()


@pytest.mark.parametrize(("ratio", "status"), [(1.05, 0), (1.15, 1)])
def test_a_check_fails_where_a_ratio_is_worse_than_tolerated(
    question: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, status: int
) -> None:
    write(path_of(bench.KEPT, "tiny", "cpu"), "tiny", [Row.of("tiny", [1.0])], "cpu")
    monkeypatch.setattr(sys, "argv", ["bench", "--check", "--out", str(tmp_path / "out")])
    question.ratio = ratio
    assert bench.main() == status


def test_without_a_gpu_it_says_so_and_measures_on_the_cpu(
    question: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "tiny", "--device", "cuda", "--out", str(tmp_path)])
    assert bench.main() == 0
    assert "no GPU here" in capsys.readouterr().err
    assert path_of(tmp_path, "tiny", "cpu").exists()


def test_with_a_gpu_a_question_that_trains_on_the_cpu_is_refused(
    question: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["bench", "tiny", "--device", "cuda"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "tiny: with --device cuda one of update, memory" in capsys.readouterr().err


def test_a_question_that_is_ended_by_sigterm_leaves_no_files() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True) as asking:
        try:
            place = next(Path(line.split()[1]) for line in asking.stdout if line.startswith("in "))
            assert place.exists()
            asking.terminate()
            assert asking.wait(60) == 128 + signal.SIGTERM
        finally:
            asking.kill()
    assert not place.parent.exists()
