"""The processes of a real DataLoader, and who may end them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import gone, gone_soon

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from torch.utils.data import DataLoader
from codistill.loader_processes import spare_loaders
spare_loaders()
context, then = sys.argv[1:]
kept = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": context}
loader = DataLoader(range(1000), batch_size=None, **kept)
items = iter(loader)
next(items), next(items)  # one of each process
print(*(process.pid for process in items._workers), flush=True)
input()
if then == "go on":
    print(sum(1 for _ in items))
elif then == "terminate":
    for process in items._workers:
        process.terminate()
        process.join(30)
        print(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.parametrize(
    ("then", "said"), [("go on", ["998"]), ("terminate", ["0", "0"]), ("leave", []), ("be killed", None)]
)
def test_they_outlive_a_sigterm_that_is_not_their_parent_s_but_never_their_parent(context, then, said):
    command = [sys.executable, "-c", CODE, context, then]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as parent:
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 2, parent.stderr.read()
        for process in processes:
            os.kill(process, signal.SIGTERM)
        time.sleep(0.5)
        assert [gone(process) for process in processes] == [False, False]
        if said is None:
            parent.kill()
        output, errors = parent.communicate("\n", timeout=60)
    if said is not None:
        assert (parent.returncode, output.split(), errors) == (0, said, "")
    assert gone_soon(processes) == [True, True]
