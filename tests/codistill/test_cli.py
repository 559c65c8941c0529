import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from codistill import status
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


def test_who_reads_no_further_than_it_wants_to_is_met_with_silence():
    piped = f"{sys.executable} -u -m codistill.cli options | head -1"
    done = subprocess.run(["bash", "-c", piped], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("--codistill-")
    assert done.stderr == ""


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
        "codistill: the package fairseq_codistill is not installed; in codistill's own folder: "
        "pip install '.[fairseq]'\n"
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
        (["status"], "the following arguments are required: URL"),
        (["status", "folder", "--patience", "long"], "argument --patience: invalid float value: 'long'"),
        (["status", "folder", "--interval"], "argument --interval: expected one argument"),
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


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["http://host/x"], "URL 'http://': must be a folder or start with one of file://, s3://, gs://, az://"),
        ([" "], "URL ' ': must be a folder or start with one of file://, s3://, gs://, az://"),
        (
            ["folder", "--run-id", "../x"],
            "--run-id '../x': must be 1 to 128 letters, digits, dots, dashes or underscores, "
            "the first a letter or digit",
        ),
        (["folder", "--patience", "0"], "--patience 0: must be a finite number of seconds above 0"),
        (["folder", "--patience", "nan"], "--patience nan: must be a finite number of seconds above 0"),
        (["folder", "--interval", "inf"], "--interval inf: must be a finite number of seconds above 0"),
    ],
)
def test_status_refuses_what_cannot_work_in_one_line_and_with_status_2(arguments, complaint, capsys):
    assert main(["status", *arguments]) == 2
    assert capsys.readouterr() == ("", f"codistill: {complaint}\n")


def test_status_refuses_a_signing_key_that_is_none_without_showing_it(capsys, monkeypatch):
    monkeypatch.setenv("CODISTILL_KEY", "too short")
    assert main(["status", "folder"]) == 2
    printed, complaint = capsys.readouterr()
    assert printed == ""
    assert complaint.startswith("codistill: CODISTILL_KEY: a key of 9 bytes; ")
    assert "too short" not in complaint


def test_the_help_of_status_names_its_defaults_and_every_key_of_its_json(capsys):
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"which run there (default: {CodistillConfig(peers=1).run_id})" in text
    assert f"(default: {status.PATIENCE:g}, three heartbeats)" in text
    assert f"between two refreshes (default: {status.INTERVAL:g})" in text
    for item in (*dataclasses.fields(status.Report), *dataclasses.fields(status.Row)):
        assert item.name in text


def test_status_loads_neither_torch_nor_a_host_framework(tmp_path):
    code = (
        "import sys; from codistill.cli import main; main(['status', sys.argv[1]]);"
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'fairseq', 'timm', 'hydra'} or 'none of them')"
    )
    result = run("-c", code, str(tmp_path), cwd=ROOT)
    assert result.stdout == "none of them\n"
    assert result.stderr == f"codistill: {tmp_path} holds no run default; its first peer will make it\n"
