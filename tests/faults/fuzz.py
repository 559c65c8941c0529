"""`make fuzz`: whatever others could write, read with coverage-guided mutations for a bounded time.

Each target of `fuzz_targets` runs in a process of its own under atheris, within bounds on the time and memory of one
input. A table reports executions and coverage; a finding ends with exit status 1 and leaves its input, which
`--input FILE TARGET` runs again. Inputs that reached something new are kept beside it, for the next call to start from,
as is the fuzzer's own log.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INPUT_SECONDS = 5  # longest that one input may take
GROWTH_MB = 256  # most that resident memory may grow beyond what the imports need, the fuzzer's own included
NAMES = ("strict_json", "manifest", "latest", "post", "run", "snapshot", "proposal")


@dataclass(frozen=True)
class Result:
    """What came of one target."""

    name: str
    executions: int
    edges: int
    inputs: int
    outcomes: dict[str, int]
    finding: str


def main(arguments: list[str] | None = None) -> int:
    """Run the targets, one after the other; 1 if one of them found something."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in set(options.targets) - set(NAMES):
        parser.error(f"TARGET {name}: one of {', '.join(NAMES)} is expected")
    if options.input is not None:
        return _again(options.targets, options.input)
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: atheris is not installed here; pip install atheris (Linux, Python 3.11 to 3.13)", file=sys.stderr)
        return 2
    if options.child:
        _fuzz(options.targets[0], options.seconds, options.folder)
    names = options.targets or NAMES
    each = max(1, options.seconds // len(names))
    results = [_run(name, each, options.folder.absolute()) for name in names]
    print(_table(results))
    for result in results:
        if result.finding:
            print(f"\n{result.name}: {result.finding}")
    return int(any(result.finding for result in results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all without any")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz", help="for inputs, kept between calls")
    parser.add_argument("--input", type=Path, help="only read this file, as TARGET")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def _again(names: list[str], path: Path) -> int:
    from tests.faults.fuzz_targets import outcome, targets

    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            print(f"{name}: {outcome(targets(Path(folder))[name], path.read_bytes())}")
    return 0


def _run(name: str, seconds: int, folder: Path) -> Result:
    """Fuzz one target in a process of its own: atheris ends the process it runs in."""
    command = [sys.executable, "-m", "tests.faults.fuzz", "--child", name, "--seconds", str(seconds)]
    command += ["--folder", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    log = ended.stderr
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "log.txt").write_text(log)
    finding = "" if ended.returncode == 0 else _finding(ended.returncode, log + ended.stdout)
    counts = folder / name / "outcomes.json"
    outcomes = json.loads(counts.read_text()) if counts.exists() else {}
    last = {key: int(values[-1]) for key in ("cov", "corp") if (values := re.findall(rf"\b{key}: (\d+)", log))}
    executions = re.findall(r"^#(\d+)|number_of_executed_units: (\d+)", log, re.MULTILINE)
    done = max((int(one or other) for one, other in executions), default=0)
    return Result(name, done, last.get("cov", 0), last.get("corp", 0), outcomes, finding)


def _finding(status: int, log: str) -> str:
    error = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception|Refused)\b.*|^==\d+== ERROR: .*", log, re.MULTILINE)
    path = re.findall(r"Test unit written to (\S+)", log)
    what = error[-1] if error else f"ended with status {status}: {log.strip()[-300:]}"
    return f"{what}\n  input: {path[-1] if path else 'none was written'}"


def _table(results: list[Result]) -> str:
    rows = [("target", "executions", "edges", "inputs kept", "accepted", "refused, by cause", "finding")]
    for result in results:
        total = sum(result.outcomes.values())
        refused = {cause: n for cause, n in sorted(result.outcomes.items()) if cause != "accepted"}
        accepted = result.outcomes.get("accepted", 0)
        rows.append(
            (
                result.name,
                f"{result.executions:,}",
                str(result.edges),
                str(result.inputs),
                f"{100 * accepted / max(1, total):.1f} %",
                ", ".join(f"{cause} {100 * n / total:.1f} %" for cause, n in refused.items()) or "-",
                "yes" if result.finding else "none",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(result.executions for result in results)
    return "\n".join([*lines, "", f"{total:,} executions, {sum(bool(r.finding) for r in results)} findings"])


def _fuzz(name: str, seconds: int, folder: Path) -> None:
    """Run one target in this process, and never return."""
    import atheris

    with atheris.instrument_imports(include=["codistill.exchange"]):
        from tests.faults import fuzz_targets

    folder = folder / name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    target = fuzz_targets.targets(folder)[name]
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    counts: Counter[str] = Counter()

    def once(data: bytes) -> None:
        counts[fuzz_targets.outcome(target, data)] += 1
        if counts.total() % 1000 == 0:  # nothing runs after the last input
            (folder / "outcomes.json").write_text(json.dumps(counts))

    def mutated(data: bytes, longest: int, seed: int) -> bytes:
        found = fuzz_targets.mutate(target, data, seed) if seed % 2 else None
        return found if found is not None and len(found) <= longest else atheris.Mutate(data, longest)

    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    bounds = [f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={here + GROWTH_MB}"]
    places = [f"-max_len={target.longest}", f"-artifact_prefix={folder}/", str(corpus)]
    atheris.Setup([sys.argv[0], "-print_final_stats=1", *bounds, *places], once, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
