"""One worker of a timm training, in a process of its own that was forked with torch and timm already imported.

Runs a train.py as `python train.py …` does, or through `timm-codistill`, and records what a log would round: the loss
of every batch, whether a penalty was added, what the batch was, and the state of every random generator after it.
"""

import dataclasses
import hashlib
import json
import os
import random
import runpy
import sys
import time

import numpy
import torch
import torchvision.utils  # noqa: F401  # imported before the fork, like timm: it takes seconds
from timm.task import ClassificationTask
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import timm_codistill.__main__
from tests.integration import sync_batchnorm_on_cpu


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a worker is told.

    Attributes:
        script: the train.py.
        flags: its arguments.
        codistilled: whether it runs through `timm-codistill`.
        out: gets the standard output; `err` the error stream, `record` the lines of `record`.
        env: environment variables to set.
        sampler_seed: seed of a distributed sampler where the script names none.
        pause: seconds that every batch takes longer.
        sync_batchnorm: whether torch's SyncBatchNorm is to work here.
    """

    script: str
    flags: list
    codistilled: bool
    out: str
    err: str
    record: str
    env: dict
    sampler_seed: int
    pause: float
    sync_batchnorm: bool


def work(worker):
    """Be that worker."""
    os.setsid()
    for name, stream in ((worker.out, 1), (worker.err, 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    os.environ.update(worker.env)
    torch.set_num_threads(1)
    if "cuda" in worker.flags:
        make_repeatable()
    if worker.sync_batchnorm:
        sync_batchnorm_on_cpu.enable()
    record(worker.record, worker.pause)
    if worker.codistilled:
        sys.argv = ["timm-codistill", worker.script, *worker.flags]
        timm_codistill.__main__.main()
    else:
        make_stock_work(worker.sampler_seed)
        sys.argv = [worker.script, *worker.flags]
        sys.path.insert(0, os.path.dirname(worker.script))
        runpy.run_path(worker.script, run_name="__main__")


def make_repeatable():
    """The same bits of the same training on a GPU: no kernel adds in an order of its own."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.enabled = False  # train.py has it choose its algorithms by the clock


def make_stock_work(sampler_seed):
    """What a plain train.py cannot do on a CPU, or with one worker, or by a flag.

    timm hands device ids to DistributedDataParallel, asks for persistent workers even where there are none (to 1.0.28),
    and has no seed for its sampler.
    """
    host_prepare, host_init = ClassificationTask.prepare_distributed, DistributedSampler.__init__
    host_load = DataLoader.__init__

    def prepare(self, device_ids=None, **kwargs):
        return host_prepare(self, device_ids=None, **kwargs)

    def init(self, *args, **kwargs):
        host_init(self, *args, **{"seed": sampler_seed, **kwargs})

    def load(self, *args, **kwargs):
        if not kwargs.get("num_workers"):
            kwargs.pop("persistent_workers", None)
        host_load(self, *args, **kwargs)

    ClassificationTask.prepare_distributed, DistributedSampler.__init__ = prepare, init
    DataLoader.__init__ = load


def generators():
    """A digest of everything that the next random number depends on."""
    states = (
        random.getstate(),
        [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
    )
    engines = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
    drawn = b"".join(state.numpy().tobytes() for state in engines)
    return hashlib.sha256(repr(states).encode() + drawn).hexdigest()[:16]


def penalised(task):
    """Whether peers were asked for this batch."""
    codistiller = getattr(task, "_codistiller", None)
    return codistiller is not None and codistiller.active


def digest(batch):
    """Of images and labels, to the last bit."""
    return hashlib.sha256(b"".join(part.cpu().contiguous().numpy().tobytes() for part in batch)).hexdigest()[:16]


def position(task):
    """Epoch, from 1, and micro-batch, where all peers go through the same ones."""
    sampling = getattr(task, "_sampling", None)
    return [sampling.position.epoch, sampling.position.batch] if sampling is not None else None


def record(path, pause):
    """Append a line for every batch to `path`."""
    host_call = ClassificationTask.__call__

    def call(self, *args, **kwargs):
        result = host_call(self, *args, **kwargs)
        with open(path, "a", encoding="utf-8") as file:
            line = {
                "loss": float(result["loss"]),
                "penalised": penalised(self),
                "generators": generators(),
                "inputs": digest(args),
                "position": position(self),
            }
            file.write(json.dumps(line) + "\n")
        time.sleep(pause)
        return result

    ClassificationTask.__call__ = call
