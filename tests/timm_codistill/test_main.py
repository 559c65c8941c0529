"""The command: what it says when there is no train.py that it can run."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from timm_codistill import __main__ as command
from timm_codistill import hooks

STAND_IN = Path(__file__).resolve().parents[2] / "recipes" / "embedded" / "vision" / "train.py"
VERSION = importlib.metadata.version("timm")
GET = (
    f"; get the one for timm {VERSION}: curl -fLO "
    f"https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{VERSION}/train.py"
)


@pytest.fixture
def ends(monkeypatch, tmp_path):
    """Runs the command with arguments; gives its last words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["timm-codistill", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return str(ended.value)

    return run


@pytest.mark.parametrize("arguments", [(), ("--model", "resnet18")])
def test_without_a_path_one_line_says_where_to_get_the_file(ends, arguments):
    assert ends(*arguments) == f"timm-codistill: no train.py was named; looked for it as the first argument{GET}"


def test_a_path_that_leads_nowhere_is_named(ends, tmp_path):
    assert ends("train.py") == f"timm-codistill: train.py: no train.py there; looked in {tmp_path}{GET}"


def test_a_script_of_another_shape_is_refused_before_it_runs(ends, tmp_path):
    path = tmp_path / "train.py"
    path.write_text("raise RuntimeError('it ran')\ndef main(): pass\ndef train_one_epoch(epoch, loader): pass\n")
    assert ends(str(path)) == (
        f"timm-codistill: {path}: not a train.py of timm 1.0.27 to 1.0.31; looked in it for parser, _parse_args, "
        "create_dataset, create_loader, ClassificationTask, train_one_epoch(…, optimizer, …), "
        f"train_one_epoch(…, args, …), train_one_epoch(…, task, …){GET}"
    )


def test_a_script_that_wants_another_timm_is_refused(ends, tmp_path):
    path = tmp_path / "train.py"
    path.write_text("from timm.task import TaskOfTheFuture\n" + STAND_IN.read_text(encoding="utf-8"))
    said = ends(str(path))
    assert said.startswith(f"timm-codistill: {path}: cannot be imported: cannot import name 'TaskOfTheFuture'")
    assert said.endswith(GET)
    assert "\n" not in said


@pytest.mark.parametrize("version", ["1.0.26", "1.1.0", "0.9.16.dev0"])
def test_with_a_timm_out_of_range_the_remedy_is_another_timm(ends, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert ends().endswith(
        f"; timm {version} is installed, it works with 1.0.27 to 1.0.31: pip install 'timm>=1.0.27,<=1.0.31'"
    )


def test_without_timm_the_remedy_is_to_install_it(ends, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert ends().endswith("; timm is not installed: pip install 'timm>=1.0.27,<=1.0.31'")


def test_the_stand_in_has_the_shape():
    assert hooks.missing(STAND_IN.read_text(encoding="utf-8")) == []


def test_help_says_how_to_start_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["timm-codistill", "--help"])
    command.main()
    assert "torchrun --nproc-per-node N -m timm_codistill path/to/train.py" in capsys.readouterr().out
