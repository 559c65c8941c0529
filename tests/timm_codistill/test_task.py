"""CodistillationTask: its penalty, and everything timm's ClassificationTask does."""

import copy
import inspect
import json
import time

import pytest
import torch
from timm.loss import JsdCrossEntropy, LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from codistill import KEYS, ConfigError, Position
from tests.timm_codistill.fixtures_tasks import (  # noqa: F401
    IMAGES,
    LABELS,
    MODELS,
    gradients,
    loader,
    options,
    peers,
    update,
)
from timm_codistill import CodistillationTask

# ruff: noqa: F811

GIVEN = {"resnet": {"num_classes": 5}, "vit": {"num_classes": 5, "img_size": 32}}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_the_gradient_has_alpha_times_the_mean_penalty_in_it_and_the_value_is_the_host_s_own(peers, build):
    torch.manual_seed(1)
    published, own = peers.publish(build()), build()
    task = peers.task(0, own, "--codistill-alpha", "0.7")
    peers.until_it_has_a_peer(task, own.train())
    result = task(IMAGES, LABELS)
    found = gradients(own, result["loss"])

    logits = own(IMAGES)
    with torch.no_grad():
        target = published(IMAGES).softmax(-1)  # batch statistics travelled: it is in eval mode, bit for bit
    host = F.cross_entropy(logits, LABELS)
    penalty = F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")
    assert result["loss"].item() == host.item()
    torch.testing.assert_close(found, gradients(own, host + 0.7 * penalty), rtol=1e-4, atol=1e-6)
    host_alone = gradients(own, F.cross_entropy(own(IMAGES), LABELS))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, host_alone, strict=True) if a is not None)


def test_a_peer_s_output_is_the_publisher_s_in_eval_mode_bit_for_bit(peers):
    published, own = peers.publish(MODELS["resnet"]()), MODELS["resnet"]()
    assert published.bn1.running_mean.abs().sum() > 0
    task = peers.task(0, own)
    peers.until_it_has_a_peer(task, own)
    seen = []
    task._codistiller.penalty(own(IMAGES), lambda peer: seen.append(peer(IMAGES)) or seen[-1].clone())
    with torch.no_grad():
        assert torch.equal(seen[0], published(IMAGES))
    assert not seen[0].requires_grad


def test_a_peer_that_changes_its_input_in_place_does_not_change_the_batch(peers):
    peers.publish(MODELS["vit"]())
    own, images, seen = MODELS["vit"](), IMAGES.clone(), []
    task = peers.task(0, own)
    peers.until_it_has_a_peer(task, own)
    peer = task._codistiller._exchange._modules._modules[1]
    peer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].zero_()))
    task(images, LABELS)
    assert len(seen) == 1
    assert torch.equal(images, IMAGES)


def test_with_jsd_the_penalty_covers_the_split_that_is_compared_with_labels(peers):
    published, own = peers.publish(MODELS["vit"]()), MODELS["vit"]()
    task = peers.task(0, own, criterion=JsdCrossEntropy(num_splits=2, smoothing=0))
    peers.until_it_has_a_peer(task, own)
    found = gradients(own, task(IMAGES, LABELS)["loss"])
    logits = own(IMAGES)
    with torch.no_grad():
        target = published(IMAGES[:4]).softmax(-1)
    penalty = F.kl_div(logits[:4].log_softmax(-1), target, reduction="batchmean")
    wanted = gradients(own, JsdCrossEntropy(num_splits=2, smoothing=0)(logits, LABELS) + penalty)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_peers_are_compiled_as_the_model_is(peers):
    own = MODELS["resnet"]()
    peers.publish(MODELS["resnet"]())
    task = peers.task(0, own)
    compiled = task.compile(backend="eager")
    assert task.get_eval_model() is compiled
    peers.until_it_has_a_peer(task, own)
    kinds = []
    task._codistiller.penalty(own(IMAGES), lambda peer: kinds.append(peer._compiled_call_impl) or peer(IMAGES))
    assert kinds[0] is not None
    assert task.get_checkpoint_state()["state_dict"].keys() == own.state_dict().keys()


def test_nothing_of_ours_is_in_any_state_dict_and_the_task_state_is_plain(peers, tmp_path):
    own = MODELS["resnet"]()
    peers.publish(MODELS["resnet"]())
    task = peers.task(0, own, "--codistill-weight-decay", "0:1e-3,1:0")
    peers.until_it_has_a_peer(task, own.train())
    plain = ClassificationTask(MODELS["resnet"](), nn.CrossEntropyLoss())
    task.setup_ema()
    plain.setup_ema()
    assert task.state_dict().keys() == plain.state_dict().keys()
    assert task.get_checkpoint_state(ema=True).keys() == {"state_dict_ema"}
    torch.save(task.get_checkpoint_state(), tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["task_state"]["codistill"]["in_use"]["1"]["final"]
    plain.load_checkpoint_state(saved["state_dict"], saved["task_state"])


def test_peers_may_forget_what_lies_before_an_epoch_s_checkpoint_but_not_before_one_within(peers, monkeypatch):
    own = MODELS["resnet"]()
    task = peers.task(0, own)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.0)
    floors = []
    for epoch in task.epochs(range(2), DataLoader(IMAGES, batch_size=2), optimizer, save_dir=peers.folder / "0"):
        for step in range(4 * epoch, 4 * epoch + 4):
            update(task, optimizer, step + 1)
            monkeypatch.setattr(task._codistiller, "checkpoint_saved", floors.append)
            task.get_checkpoint_state()  # within an epoch as timm's --recovery-interval does
    assert floors == [4]


def test_without_the_switch_it_is_a_classification_task(tmp_path):
    model = MODELS["resnet"]()
    task = CodistillationTask(model, LabelSmoothingCrossEntropy(), options=options())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in task.epochs(range(1), loader(), optimizer, save_dir=tmp_path):
        update(task, optimizer, 1)
    assert task.metrics() == {}
    assert task.get_task_state() == {}
    assert list(tmp_path.iterdir()) == []


def test_device_dtype_clipping_and_optimizer_groups_are_those_of_a_classification_task():
    torch.manual_seed(0)
    ours = CodistillationTask(
        MODELS["vit"](), nn.CrossEntropyLoss(), options=options("--codistill", "--codistill-peers", "1")
    )
    plain = ClassificationTask(MODELS["vit"](), nn.CrossEntropyLoss())
    for task in (ours, plain):
        task.to(torch.bfloat16)
    assert (ours.device, ours.dtype) == (plain.device, plain.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert len(list(ours.get_clip_parameters(exclude_head=True))) == len(plain.get_clip_parameters(exclude_head=True))
    groups = [
        [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        for optimizer in (
            create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=0.1)
            for task in (ours, plain)
        )
    ]
    assert groups[0] == groups[1]


def test_one_peer_has_every_metric_and_the_scheduled_weight_decay_also_after_a_resume(peers, tmp_path):
    model = MODELS["resnet"]()
    flags = ("--codistill-weight-decay", "0:1e-3,1:0,2:1e-4")
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1)
    seen = []
    task = peers.task(0, model, *flags, peers=1)
    for epoch in task.epochs(range(2), loader(), optimizer, save_dir=tmp_path):
        update(task, optimizer, epoch + 1)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
        assert task.metrics().keys() == {f"codistill_{key}" for key in KEYS}
    state = task.get_task_state()
    assert state["codistill"]["decaying"] == [False, True]
    resumed = peers.task(0, model, *flags, peers=1)
    resumed.load_task_state(state)
    for _ in resumed.epochs(range(2, 3), loader(), optimizer, save_dir=tmp_path):
        update(resumed, optimizer, 3)
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
    assert seen == [[0, 1e-3], [0, 0], [0, 1e-4]]
    assert resumed.metrics()["codistill_distance"] > task.metrics()["codistill_distance"] > 0


def test_a_data_set_that_names_its_classes_differently_is_another_run_s(peers):
    peers.publish(MODELS["resnet"]())
    other = create_model("test_resnet", num_classes=6)
    task = peers.task(0, other)
    task.begin_epoch(0, loader(), torch.optim.SGD(other.parameters(), lr=0.1), save_dir=peers.folder / "0")
    with pytest.raises(ConfigError, match="output"):
        task(IMAGES, LABELS)


def test_an_optimizer_that_takes_second_derivatives_is_refused_when_there_are_peers(peers):
    def begin(task, model):
        optimizer = create_optimizer_v2(model, opt="adahessian", lr=0.1)
        task.begin_epoch(0, loader(), optimizer, save_dir=peers.folder / "0")

    model = MODELS["resnet"]()
    begin(peers.task(0, model, peers=1), model)
    with pytest.raises(ConfigError) as error:
        begin(peers.task(0, model), model)
    assert str(error.value) == (
        "--codistill: Adahessian takes second derivatives, which the penalty does not have; "
        "choose another --opt, or leave --codistill out"
    )


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ("resnet", {"name": "test_resnet.r160_in1k", "arguments": {"num_classes": 5}}),
        ("vit", {"name": "test_vit.r160_in1k", "arguments": {"img_size": 32, "num_classes": 5}}),
        ("resnext", None),  # built by hand
    ],
)
def test_a_manifest_says_which_of_timm_s_models_it_is(peers, model, wanted):
    peers.publish(MODELS[model](), updates=1, model_arguments=GIVEN.get(model))
    latest = json.loads((peers.folder / "exchange/default/peers/1/latest.json").read_text(encoding="utf-8"))
    assert latest["manifest"]["architecture"] == wanted


@pytest.mark.parametrize(("ours", "theirs"), [("resnet", "vit"), ("vit", "resnet")])
def test_peers_of_two_architectures_codistil(peers, ours, theirs):
    published = peers.publish(MODELS[theirs](), model_arguments=GIVEN[theirs])
    own = MODELS[ours]().to(memory_format=torch.channels_last)
    task = peers.task(0, own, model_arguments=GIVEN[ours])
    task.compile(backend="eager")
    peers.until_it_has_a_peer(task, own)
    seen = []
    task._codistiller.penalty(own(IMAGES), lambda peer: seen.append(peer) or peer(IMAGES))
    assert type(seen[0]) is type(published)
    assert seen[0]._compiled_call_impl is not None
    with torch.no_grad():
        torch.testing.assert_close(seen[0](IMAGES), published(IMAGES))
    assert task.metrics()["codistill_incidents"] == 0


def test_an_unlike_peer_that_says_too_little_is_refused_and_training_goes_on(peers):
    peers.publish(MODELS["vit"](), model_arguments={"img_size": 64})
    own = MODELS["resnet"]()
    task = peers.task(0, own)
    task.begin_epoch(0, loader(), torch.optim.SGD(own.parameters(), lr=0.0), save_dir=peers.folder / "0")
    step = 0
    while task.metrics()["codistill_incidents"] == 0:
        step += 1
        assert step < 1000
        task(IMAGES, LABELS)
        task.update_ema(step)
        time.sleep(0.02)
    assert task.metrics()["codistill_peers"] == 0


def test_the_moving_average_is_published_where_that_is_asked_for(peers):
    published = MODELS["resnet"]()
    task = peers.task(1, published, "--codistill-publish", "ema")
    task.setup_ema(decay=0.5)
    optimizer = torch.optim.SGD(published.parameters(), lr=0.05)
    for _ in task.epochs(range(1), loader(), optimizer, save_dir=peers.folder / "1"):
        for step in range(3):
            update(task, optimizer, step + 1)
    average = task.trainable_module_ema.module.eval()

    own = MODELS["resnet"]()
    task = peers.task(0, own)
    peers.until_it_has_a_peer(task, own)
    seen = []
    task._codistiller.penalty(own(IMAGES), lambda peer: seen.append(peer(IMAGES)) or seen[-1].clone())
    with torch.no_grad():
        assert torch.equal(seen[0], average(IMAGES))
        assert not torch.allclose(seen[0], published.eval()(IMAGES))


def test_a_moving_average_that_is_not_kept_cannot_be_published(peers):
    model = MODELS["resnet"]()
    task = peers.task(0, model, "--codistill-publish", "ema")
    with pytest.raises(ConfigError) as error:
        task.begin_epoch(0, loader(), torch.optim.SGD(model.parameters(), lr=0.1), save_dir=peers.folder / "0")
    assert str(error.value) == (
        "--codistill-publish ema: there is no moving average of the weights; add --model-ema, or leave it out"
    )


def test_an_epoch_of_which_much_was_skipped_counts_as_whole(peers):
    model = MODELS["resnet"]()
    task = peers.task(0, model, "--codistill-exchange", "prediction")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    eight = DataLoader(TensorDataset(IMAGES.repeat(2, 1, 1, 1), LABELS.repeat(2)), batch_size=2)
    seen = []
    for _ in task.epochs(range(2), eight, optimizer, save_dir=peers.folder / "0"):
        for images, labels in task.batches(eight):
            task(images, labels)["loss"].backward()
            optimizer.step()
            task.update_ema()
            seen.append((task._sampling.position, task.updates))
            if seen[-1][0] == Position(1, 1):
                task._sampling.skip_to(Position(2, 3))
    assert seen == [
        *((Position(1, number), number + 1) for number in (0, 1)),
        *((Position(2, number), 9 + count) for count, number in enumerate((0, 3, 4, 5, 6, 7))),
    ]
    assert task.updates == 16


def test_a_loop_of_one_s_own_that_remembers_the_generators_before_it_saves_goes_on_with_the_same_bits(peers):
    def train(epochs, seed, saved=None):
        torch.manual_seed(seed)
        model = create_model("test_vit", num_classes=5, img_size=32, drop_rate=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        shuffled = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True)
        task = peers.task(0, model, "--codistill-sync", peers=1)
        if saved is not None:
            model.load_state_dict(saved["model"])
            task.load_task_state(saved["task"])
        for _ in task.epochs(epochs, shuffled, optimizer, save_dir=peers.folder / "0"):
            for images, labels in shuffled:
                task(images, labels)["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
                task.update_ema()
            task.remember_generators()
            saved = saved or {"model": copy.deepcopy(model.state_dict()), "task": task.get_task_state()}
        return model.state_dict(), saved

    whole, saved = train(range(2), seed=1)
    again, _ = train(range(1, 2), seed=2, saved=saved)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_a_loop_of_one_s_own_that_leaves_the_order_to_the_loader_is_told_how_to_coordinate(peers):
    model = MODELS["resnet"]()
    task = peers.task(0, model, "--codistill-exchange", "prediction")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    task.begin_epoch(0, loader(), optimizer, save_dir=peers.folder / "0")
    with pytest.raises(ConfigError) as error:
        task(IMAGES, LABELS)
    assert str(error.value) == (
        "--codistill-exchange prediction: all peers must go through the same batches; "
        "iterate over task.batches(loader) in place of the loader"
    )
    plain = peers.task(1, model)
    plain.begin_epoch(0, loader(), optimizer, save_dir=peers.folder / "1")
    assert [plain.batches(part) for part in "ab"] == [plain.mixing(part) for part in "ab"] == ["a", "b"]


def test_every_method_takes_what_timm_s_own_takes():
    for name, ours in inspect.getmembers(CodistillationTask, inspect.isfunction):
        host = getattr(ClassificationTask, name, ours)
        taken = inspect.signature(ours).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            assert inspect.signature(host).parameters.keys() <= {parameter.name for parameter in taken}, name
