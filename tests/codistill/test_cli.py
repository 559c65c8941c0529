import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from codistill.cli import main
from codistill.config import CodistillConfig, DataConfig

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_user_dir_prints_the_real_path_of_the_plug_in(capsys):
    assert main(["user-dir", "fairseq"]) == 0
    printed, complaints = capsys.readouterr()
    assert printed == f"{ROOT / 'fairseq_codistill'}\n"
    assert complaints == ""


def test_user_dir_resolves_links(tmp_path):
    (tmp_path / "fairseq_codistill").symlink_to(ROOT / "fairseq_codistill")
    result = run("-m", "codistill.cli", "user-dir", "fairseq", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{ROOT / 'fairseq_codistill'}\n", "")


def test_user_dir_imports_neither_fairseq_nor_the_plug_in(tmp_path):
    code = (
        "import sys; from codistill.cli import main; main(['user-dir', 'fairseq']);"
        "print({name.split('.')[0] for name in sys.modules} & {'fairseq', 'fairseq_codistill', 'hydra'} or 'neither')"
    )
    result = run("-c", code, cwd=tmp_path)
    assert (result.stdout, result.stderr) == (f"{ROOT / 'fairseq_codistill'}\nneither\n", "")


def test_a_missing_plug_in_is_one_line_on_standard_error(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq_codistill", None)  # Python's own way to say: cannot be found
    assert main(["user-dir", "fairseq"]) == 1
    printed, complaints = capsys.readouterr()
    assert printed == ""
    assert complaints == (
        "codistill: the package fairseq_codistill is not installed; try: pip install 'codistill[fairseq]'\n"
    )


def test_version_is_the_distributions(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == "codistill 0.1.0\n"


def test_help_names_the_commands_and_what_they_are_for(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "user-dir" in text
    assert "--user-dir" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["user-dir", "keras"], "invalid choice: 'keras'"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_what_is_wrong(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_options_lists_every_flag_with_its_default_and_help(capsys):
    assert main(["options"]) == 0
    text = capsys.readouterr().out
    for item in (*dataclasses.fields(CodistillConfig), *dataclasses.fields(DataConfig)):
        assert f"--codistill-{item.name.replace('_', '-')}" in text
        assert f"(default: {item.default})" in text
        assert item.metadata["help"].split()[-1] in text
    assert "--codistill-loss {kl,mse,ce} (default: kl)" in text
