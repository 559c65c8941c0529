"""The kernel for GPUs, where there is none: interpreted in a process of its own, and not imported without need."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("interpreted_fused.py")


def python(*arguments, **env):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, timeout=240, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_it_gives_what_torchs_operators_give():
    # Triton reads its environment when it is imported, which another test may have done.
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", CASES, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-5000:]


def test_it_is_not_even_imported_for_logits_on_a_cpu():
    code = "import sys, torch; from codistill.losses import distill; logits = torch.zeros(2, 3); "
    code += "distill(logits, [logits], loss='kl'); sys.exit('codistill.fused' in sys.modules)"
    assert python("-c", code).returncode == 0
