"""fairseq-hydra-train from a YAML config: `criterion: {_name: codistill, …}`."""

import math

import pytest
import yaml

from tests.integration.fairseq_trainings import USER_DIR

SIDE = {"layers": 1, "embed_dim": 32, "ffn_embed_dim": 64, "attention_heads": 2}


@pytest.fixture
def from_yaml(trainings):
    """Starts a peer as `fairseq_trainings` does, but every option is in a YAML file."""

    def start(number, run_id, common=None, **codistill):
        name = f"{run_id}-{number}"
        config = {
            "common": {
                **{"cpu": True, "seed": number + 1, "user_dir": USER_DIR, "log_format": "json", "log_interval": 1},
                **(common or {}),
            },
            "checkpoint": {"save_dir": str(trainings.folder / name), "no_epoch_checkpoints": True},
            "dataset": {"max_tokens": 300, "num_workers": 0, "update_epoch_batch_itr": True},
            "optimization": {"lr": [0.003], "max_update": 20},
            "optimizer": {"_name": "adam"},
            "lr_scheduler": {"_name": "fixed"},
            "task": {
                **{"_name": "translation", "data": str(trainings.toy.translation)},
                **{"source_lang": "src", "target_lang": "tgt"},
            },
            "model": {
                **{"_name": "transformer", "share_all_embeddings": True, "dropout": 0.1, "attention_dropout": 0.1},
                **{"encoder": SIDE, "decoder": SIDE},
            },
            "criterion": {
                **{"_name": "codistill", "label_smoothing": 0.1},
                **{"codistill_dir": str(trainings.exchange), "codistill_run_id": run_id, "codistill_peer": number},
                **{"codistill_interval": 5, "codistill_timeout": 120.0, "codistill_sync": True},
                **{f"codistill_{key}": value for key, value in codistill.items()},
            },
        }
        folder = trainings.folder / "configs"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text("# @package _group_\n" + yaml.safe_dump(config), encoding="utf-8")
        outputs = f"hydra.run.dir={trainings.folder / 'outputs' / name}"
        return trainings.launch(name, [["hydra_train", "--config-dir", str(folder), "--config-name", name, outputs]])

    return start


def test_a_yaml_config_trains_exactly_as_the_command_line(trainings, from_yaml):
    written = [from_yaml(number, "yaml") for number in (0, 1)]
    typed = [trainings.peer(number, "--codistill-sync", run_id="typed") for number in (0, 1)]
    for found, wanted in zip(written, typed, strict=True):
        assert found.wait().records() == wanted.wait().records()
        assert [update for update, added in found.penalties().items() if added] == list(range(5, 20))


def test_bfloat16_trains_with_a_penalty(from_yaml):
    bf16 = {"bf16": True, "fp16_no_flatten_grads": True}
    for training in [from_yaml(number, "bf16", common=bf16, dtype="bfloat16") for number in (0, 1)]:
        penalties = training.wait().penalties()
        assert [update for update, added in penalties.items() if added] == list(range(5, 20))
        assert all(math.isfinite(added) for added in penalties.values())
        assert training.metrics()[-1]["incidents"] == 0


def test_a_bad_value_in_a_yaml_config_is_one_line(from_yaml):
    errors = from_yaml(0, "bad", temperature=-1).fails()
    assert errors.splitlines()[-1] == "--codistill-temperature -1.0: must be a finite number above 0"
    assert "Traceback" not in errors
