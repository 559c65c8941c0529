"""The loop in docs/own-loop.md, taken from there: two real processes of it exchange, and learn from each other."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Imports take seconds and differ from process to process: the two begin their loops together.
TOGETHER = """
import runpy, sys, time
from pathlib import Path
import torch, codistill.codistiller
Path(f"ready{sys.argv[1]}").touch()
while not all(Path(f"ready{peer}").exists() for peer in (0, 1)):
    time.sleep(0.01)
runpy.run_path("loop.py", run_name="__main__")
print(sorted({"fairseq", "timm"} & sys.modules.keys()))
"""


def loop() -> str:
    """The complete one, the page's only block of Python."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


@pytest.mark.timeout(180)
def test_the_loop_in_the_docs_codistils_with_a_second_one_without_fairseq_or_timm(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(loop(), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(peer)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for peer in (0, 1)
    ]
    try:
        outcomes = [process.communicate(timeout=150) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for peer, (process, (out, errors)) in enumerate(zip(processes, outcomes, strict=True)):
        assert process.returncode == 0, errors
        assert out.splitlines()[-1] == "[]"
        lines = [json.loads(line) for line in (tmp_path / f"peer{peer}" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["update"] == 1000
        assert lines[-1]["incidents"] == 0
        assert lines[-1]["sent"] > 0
        assert lines[-1]["received"] > 0
        assert any(line["peers"] == 1 and line["loss"] > 0 for line in lines)
    assert not [left.name for left in tmp_path.iterdir() if left.name.startswith("codistill")]
