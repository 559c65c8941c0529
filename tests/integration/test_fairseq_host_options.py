"""fairseq's own options behave as without us.

Under each of them a plain training, and two peers: one of weight 0, which must be the plain training to the last bit
although it swaps snapshots, and one with a penalty, which must get it from the first swap on.
"""

import math

import pytest
import torch

from tests.integration.fairseq_trainings import LANGUAGE_MODELING, TRANSFORMER_LM, USER_DIR

CASES = {
    "accumulation, EMA, checkpoints by updates": {
        "flags": (
            *("--update-freq", "2", "--store-ema", "--ema-decay", "0.9", "--save-interval-updates", "5"),
            *("--clip-norm", "0.5", "--report-accuracy", "--ignore-prefix-size", "1", "--sentence-avg"),
        )
    },
    "half precision": {"flags": ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4")},
    "automatic mixed precision": {"flags": ("--amp",)},
    "torch's data parallelism, and a worker without a batch at an epoch's end": {
        "workers": 2,
        "ddp_backend": "pytorch_ddp",
        "flags": ("--update-freq", "2", "--batch-size", "80", "--max-tokens", "1000"),  # five batches in an epoch
    },
    "a language model": {"task": LANGUAGE_MODELING, "model": TRANSFORMER_LM},
    "part of the data, BLEU, loader processes": {
        "task": ("--task", "codistill_translation", "--source-lang", "src", "--target-lang", "tgt"),
        "flags": (
            *("--user-dir", USER_DIR, "--codistill-data-fraction", "0.5", "--num-workers", "2"),
            *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}', "--eval-tokenized-bleu"),
        ),
    },
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_weight_0_is_the_plain_training_and_a_penalty_gets_through(trainings, case):
    how = dict(case)
    flags = how.pop("flags", ())
    if "task" in how and "language_modeling" in how["task"]:
        how["data"] = trainings.toy.language_modeling
    plain = trainings.stock("plain", *flags, **how)
    off = trainings.peer(0, *flags, "--codistill-sync", "--codistill-alpha", "0", **how)
    on = trainings.peer(1, *flags, "--codistill-sync", **how)
    for training in (plain, off, on):
        training.wait()

    for rank in range(len(plain.processes)):
        for step in ("train", "valid"):
            assert off.records(rank, step) == plain.records(rank, step)
    found, wanted = off.checkpoint(), plain.checkpoint()
    torch.testing.assert_close(found["model"], wanted["model"], rtol=0, atol=0)
    torch.testing.assert_close(found["extra_state"].get("ema"), wanted["extra_state"].get("ema"), rtol=0, atol=0)
    names = {file.name for file in plain.save_dir.glob("checkpoint*")}
    assert {file.name for file in off.save_dir.glob("checkpoint*")} == names

    assert [update for update, added in on.penalties().items() if added] == list(range(5, 20))
    assert all(math.isfinite(added) and added >= 0 for added in on.penalties().values())
    if "workers" in case:  # fairseq gives such a worker a batch whose loss it multiplies by 0
        assert any(entry["loss"] == 0 for entry in on.records(rank=1) if entry["update"] >= 5)
    assert [line["peers"] for line in on.metrics()] == [1, 1, 1, 1]
    assert sum(line["incidents"] for line in on.metrics()) == 0
    assert {file.name for file in on.save_dir.glob("checkpoint*")} == names
    assert plain.logged("valid")[-1].keys() == on.logged("valid")[-1].keys()
