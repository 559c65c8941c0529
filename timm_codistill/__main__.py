"""`timm-codistill path/to/train.py …` runs timm's train.py with `--codistill-…` flags added to its own.

The same as `python -m timm_codistill path/to/train.py …`; for several workers
`torchrun --nproc-per-node N -m timm_codistill path/to/train.py …`. The file stays as it is; it is not part of timm's
package, and one from another version may not fit: then one line says where the right one is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

SCRIPT = "https://raw.githubusercontent.com/huggingface/pytorch-image-models/v{version}/train.py"
INSTALL = "pip install 'timm>=1.0.27,<=1.0.31'"
OLDEST, NEWEST = (1, 0, 27), (1, 0, 31)


def main() -> None:
    """The command's entry point; ends the process with one line when there is no train.py that it can run."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not arguments or arguments[0].startswith("-"):
        _refuse("no train.py was named; looked for it as the first argument")
    path = Path(arguments[0]).absolute()
    if path.suffix != ".py" or not path.is_file():
        _refuse(f"{arguments[0]}: no train.py there; looked in {path.parent}")
    # A checkout brings its own timm, which must be found before an installed one.
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path), *arguments[1:]]
    try:
        from timm_codistill import hooks  # imports timm

        lacking = hooks.missing(path.read_text(encoding="utf-8"))
        if lacking:
            _refuse(f"{path}: not a train.py of timm 1.0.27 to 1.0.31; looked in it for {', '.join(lacking)}")
        module = _load(path)
    except (ImportError, SyntaxError, UnicodeDecodeError) as error:
        _refuse(f"{path}: cannot be imported: {error}")
    hooks.run(module)


def _load(path: Path) -> ModuleType:
    """Import the file under its own name, where processes that a DataLoader spawns find it too."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _refuse(problem: str) -> NoReturn:
    raise SystemExit(f"timm-codistill: {problem}; {_remedy()}")


def _remedy() -> str:
    """The command that gets a train.py that fits the installed timm, or a timm that fits us."""
    try:
        version = importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return f"timm is not installed: {INSTALL}"
    if not OLDEST <= tuple(map(int, re.findall(r"\d+", version)[:3])) <= NEWEST:
        return f"timm {version} is installed, it works with 1.0.27 to 1.0.31: {INSTALL}"
    return f"get the one for timm {version}: curl -fLO {SCRIPT.format(version=version)}"


if __name__ == "__main__":
    main()
