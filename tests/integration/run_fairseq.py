"""Runs one of fairseq's commands the way its console script does: `python run_fairseq.py train …`.

`FAIRSEQ_RECORD=FILE` appends the exact numbers of every batch to FILE (fairseq's own log rounds them), the same for a
plain training and a codistilled one. `FAIRSEQ_PAUSE=SECONDS` makes every batch take that much longer. Once FILE of
`FAIRSEQ_STOP=FILE` is there, training ends after the update that it names, as fairseq ends it for reasons of its own.
"""

import hashlib
import importlib
import json
import os
import random
import sys
import time

import numpy
import torch


def generators():
    """A digest of everything that the next random number depends on."""
    states = (
        random.getstate(),
        [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
    )
    engines = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
    drawn = b"".join(state.numpy().tobytes() for state in engines)
    return hashlib.sha256(repr(states).encode() + drawn).hexdigest()[:16]


def record(path, pause):
    from fairseq.tasks import FairseqTask

    def write(step, update, sample, loss, sample_size, log):
        items = sample["id"].tolist()
        entry = {
            "step": step,
            "update": update,
            "batch": hashlib.sha256(repr(items).encode()).hexdigest()[:16],
            "loss": loss.item(),  # what was differentiated
            "host_loss": float(log["loss"]),  # what fairseq logs
            "sample_size": float(sample_size),
            "generators": generators(),
        }
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    plain_train, plain_valid = FairseqTask.train_step, FairseqTask.valid_step

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        loss, sample_size, log = plain_train(self, sample, model, criterion, optimizer, update_num, ignore_grad)
        write("train", update_num, sample, loss, sample_size, log)
        time.sleep(pause)
        return loss, sample_size, log

    def valid_step(self, sample, model, criterion):
        loss, sample_size, log = plain_valid(self, sample, model, criterion)
        write("valid", None, sample, loss, sample_size, log)
        return loss, sample_size, log

    FairseqTask.train_step, FairseqTask.valid_step = train_step, valid_step


def end_when_told(path):
    from fairseq_cli import train

    plain = train.validate_and_save

    def validate_and_save(cfg, trainer, *others):
        losses, should_stop = plain(cfg, trainer, *others)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                should_stop |= trainer.get_num_updates() >= int(file.read())
        return losses, should_stop

    train.validate_and_save = validate_and_save


def allow_ddp_on_cpu():
    """fairseq always names a device to torch's DistributedDataParallel, which torch refuses on a CPU."""
    from fairseq.models import distributed_fairseq_model

    on_device = distributed_fairseq_model.DistributedDataParallel

    def on_cpu(**arguments):
        return on_device(**{**arguments, "device_ids": None, "output_device": None})

    distributed_fairseq_model.DistributedDataParallel = on_cpu


def make_repeatable():
    """The same bits of the same training on a GPU: no kernel adds in an order of its own."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which a console script would not have there
    command = sys.argv.pop(1)
    module = importlib.import_module(f"fairseq_cli.{command}")
    random.seed(0)  # the one generator that fairseq leaves to chance
    if "FAIRSEQ_RECORD" in os.environ:
        record(os.environ["FAIRSEQ_RECORD"], float(os.environ.get("FAIRSEQ_PAUSE", "0")))
    if "FAIRSEQ_STOP" in os.environ:
        end_when_told(os.environ["FAIRSEQ_STOP"])
    if "--cpu" in sys.argv:
        allow_ddp_on_cpu()
    else:
        make_repeatable()
    module.cli_main()
