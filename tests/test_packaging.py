"""The wheel is what users get: it is built from a copy of the tree, looked into, installed, and its command run."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("codistill", "fairseq_codistill", "timm_codistill")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-cache-dir")
SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(*command: str, **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Builds from a copy, so that neither build/ nor an egg-info appears in the tree; a stray folder is put beside."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=SKIPPED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "tests").mkdir()
    (tree / "tests" / "__init__.py").touch()
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(tree))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{dist_info(wheel)}/METADATA").decode())


def dist_info(wheel: Path) -> str:
    return "-".join(wheel.name.split("-")[:2]) + ".dist-info"


def requirements(metadata: Message, extra: str = "") -> set[str]:
    """Names that `pip install codistill[extra]` asks for beyond those of `pip install codistill`."""
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    if not extra:
        return {one.name for one in asked if one.marker is None}
    return {one.name for one in asked if one.marker is not None and one.marker.evaluate({"extra": extra})}


def test_the_wheel_holds_every_module_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.startswith(dist_info(wheel))}
    expected = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert shipped == expected
    assert {f"{name}/py.typed" for name in PACKAGES} <= shipped


def test_the_wheel_is_pure_python_and_carries_its_licence(wheel, metadata):
    assert wheel.name == "codistill-0.1.0-py3-none-any.whl"
    assert metadata["License-Expression"] == "MIT"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{dist_info(wheel)}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_readme_is_the_description(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_a_plain_install_asks_for_no_host_framework(metadata):
    assert metadata["Requires-Python"] == ">=3.10"
    assert requirements(metadata) == {"torch", "obstore", "safetensors", "numpy", "rich"}


def test_each_extra_asks_for_its_framework_and_all_for_everything(metadata):
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {"fairseq", "timm", "plot", "docs", "dev", "all"}
    assert requirements(metadata, "fairseq") == {"fairseq-fixed", "sentencepiece", "sacrebleu"}
    assert requirements(metadata, "timm") == {"timm", "torchvision"}
    assert requirements(metadata, "plot") == {"matplotlib"}
    parts = extras - {"all"}
    assert requirements(metadata, "all") == set().union(*(requirements(metadata, extra) for extra in parts))


def test_every_requirement_is_pinned_in_the_constraints_and_satisfied_by_its_pin(metadata):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin.specifier for pin in map(Requirement, lines)}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        (pin,) = pins[canonicalize_name(requirement.name)]
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def test_the_installed_command_runs_and_finds_the_installed_plug_in(wheel, tmp_path):
    site = tmp_path / "site"
    run(*PIP, "install", "--no-deps", "--target", str(site), str(wheel))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = str(site / "bin" / "codistill")
    assert run(command, "--version", cwd=tmp_path, env=environment) == "codistill 0.1.0\n"
    printed = run(command, "user-dir", "fairseq", cwd=tmp_path, env=environment)
    assert printed == f"{(site / 'fairseq_codistill').resolve()}\n"
    assert "train.py" in run(str(site / "bin" / "timm-codistill"), "--help", cwd=tmp_path, env=environment)
