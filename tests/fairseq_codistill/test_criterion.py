"""The criterion: the host's loss to the last bit, and a penalty that is what its definition says."""

import itertools
import math

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codistill import KEYS
from tests.fairseq_codistill.toy_host import batch, data, hosts, quick_exchange, sentences  # noqa: F401

TERMS = [("kl", "1"), ("kl", "2.5"), ("ce", "2"), ("mse", "1")]
HUGE = 1e30  # finite, but not what is computed with it


def plain(host, **options):
    """fairseq's own criterion for the same task."""
    return LabelSmoothedCrossEntropyCriterion(host.task, **{"sentence_avg": False, "label_smoothing": 0.0, **options})


@pytest.fixture
def together(hosts):  # noqa: F811
    """Makes peer 0 with peers 1 … n at hand, and gives it with their models and the update it is at."""

    def make(*flags, others=1, spoil=None):
        models = []
        for number in range(1, others + 1):
            other = hosts(number, *flags, "--codistill-peers", str(others + 1))
            other.step(batch(other), 0)
            if spoil is not None:
                spoil(other.model)
            other.codistiller.finish(4)
            models.append(other.model.eval())
        host = hosts(0, *flags, "--codistill-peers", str(others + 1))
        return host, models, host.take_up(others)

    return make


def expected_penalty(logits, peer_logits, mask, loss, temperature):
    """From the definition: one position at a time, in float64."""
    total = logits.sum() * 0
    for at in mask.nonzero().tolist():
        x = logits[tuple(at)]
        for peer in peer_logits:
            y = peer[tuple(at)]
            p, q = (y / temperature).softmax(-1), (x / temperature).softmax(-1)
            distance = {
                "kl": lambda p=p, q=q: temperature**2 * (p * (p.log() - q.log())).sum(),
                "ce": lambda p=p, q=q: -(temperature**2) * (p * q.log()).sum(),
                "mse": lambda x=x, y=y: ((x - y) ** 2).mean(),
            }[loss]()
            total = total + distance / len(peer_logits)
    return total


@pytest.mark.parametrize(("loss", "temperature"), TERMS)
@pytest.mark.parametrize("others", [1, 2])
def test_loss_and_gradient_equal_a_float64_computation(together, loss, temperature, others):
    flags = ("--codistill-loss", loss, "--codistill-temperature", temperature, "--codistill-alpha", "0.7")
    host, peers, update = together(*flags, "--label-smoothing", "0.1", others=others)
    sample = batch(host)
    found, gradients, log = host.step(sample, update)

    model = host.model.double()
    host_loss, _, _ = plain(host, label_smoothing=0.1)(model, sample)
    logits = model(**sample["net_input"])[0]
    with torch.no_grad():
        peer_logits = [peer.double()(**sample["net_input"])[0] for peer in peers]
    mask = sample["target"] != host.task.target_dictionary.pad()
    penalty = expected_penalty(logits, peer_logits, mask, loss, float(temperature))
    wanted = host_loss + 0.7 * penalty
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    assert log["loss"].item() == pytest.approx(host_loss.item(), rel=1e-5)
    bits = 1 if loss == "mse" else math.log(2)
    assert log["codistill_loss"].item() == pytest.approx(penalty.item() / bits, rel=1e-4)
    assert log["codistill_positions"].item() == mask.sum() == log["ntokens"]
    parameters = dict(model.named_parameters())
    for name, gradient in zip(parameters, torch.autograd.grad(wanted, list(parameters.values())), strict=True):
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_a_peer_and_no_parameter_of_its_module_wants_one(together):
    host, _, update = together()
    seen = []
    predict_early, penalty = host.codistiller.predict_early, host.codistiller.penalty

    def predict_early_watched(forward):
        def forward_seen(module):
            seen.append((module, forward(module)))
            return seen[-1][1]

        predict_early(forward_seen)

    def penalty_watched(own, forward, mask, inputs):
        assert inputs == ()  # what they would be needed for costs a checksum
        return penalty(own, forward, mask, inputs)

    host.codistiller.predict_early, host.codistiller.penalty = predict_early_watched, penalty_watched
    host.step(batch(host), update)
    [(module, logits)] = seen
    assert not module.training
    assert module is not host.model
    assert not logits.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_a_peer_that_changes_its_input_in_place_does_not_change_the_batch(together):
    host, _, update = together()
    sample, seen = batch(host), []
    peer = host.codistiller._exchange._modules._modules[1]
    peer.register_forward_pre_hook(lambda _, __, fed: seen.append(fed["src_tokens"].zero_()), with_kwargs=True)
    host.step(sample, update)
    assert len(seen) == 1
    assert torch.equal(sample["net_input"]["src_tokens"], batch(host)["net_input"]["src_tokens"])


def test_a_peer_whose_logits_are_not_finite_changes_nothing_and_is_counted(together, caplog):
    def spoil(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(HUGE)

    host, [peer], update = together(spoil=spoil)
    sample = batch(host)
    assert not peer(**sample["net_input"])[0].isfinite().all()
    assert host.codistiller.active
    found, gradients, log = host.step(sample, update)
    assert found == log["loss"].item()
    assert log["codistill_loss"] == log["codistill_positions"] == 0
    host.optimizer.zero_grad()
    loss, _, _ = plain(host)(host.model, sample)
    loss.backward()
    for name, parameter in host.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)
    host.step(sample, update + 1)
    assert host.codistiller.metrics()["incidents"] == 1
    assert "not finite" in caplog.text


def test_our_own_non_finite_loss_reaches_the_host(together):
    host, _, update = together()
    with torch.no_grad():
        next(host.model.parameters()).fill_(math.nan)
    found, _, log = host.step(batch(host), update)
    assert math.isnan(found)
    assert math.isnan(log["loss"])


def test_the_order_of_sentences_and_padding_change_nothing(together):
    host, _, update = together()
    pairs = sentences()
    found, gradients, log = host.step(batch(host, pairs), update)
    for sample in (batch(host, pairs[::-1]), batch(host, pairs, pad_to=20)):
        again, same, same_log = host.step(sample, update)
        assert sample["ntokens"] == log["ntokens"]
        assert again == pytest.approx(found, rel=1e-5)
        assert same_log["codistill_loss"].item() == pytest.approx(log["codistill_loss"].item(), rel=1e-4)
        assert same_log["codistill_agreement"] == log["codistill_agreement"]
        for name, gradient in gradients.items():
            torch.testing.assert_close(same[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.fixture
def settled(together):
    return together("--codistill-alpha", "2")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(2, 8), seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 7), max_size=3))
def test_however_the_sentences_are_cut_into_batches_loss_and_gradient_add_up(settled, count, seed, cuts):
    """What --max-tokens and --update-freq do: fairseq divides the sum by the sum of sample sizes."""
    host, _, update = settled
    pairs = sentences(count, seed)
    whole, gradients, log = host.step(batch(host, pairs), update)
    edges = [0, *sorted(cut for cut in cuts if cut < count), count]
    parts = [host.step(batch(host, pairs[a:b]), update) for a, b in itertools.pairwise(edges)]
    assert sum(part[0] for part in parts) == pytest.approx(whole, rel=1e-4)
    assert sum(part[2]["sample_size"] for part in parts) == log["sample_size"]
    total = sum(part[2]["codistill_loss"].item() for part in parts)
    assert total == pytest.approx(log["codistill_loss"].item(), rel=1e-3, abs=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), gradient, rtol=1e-3, atol=1e-3)


def test_positions_that_the_host_ignores_have_no_penalty(together):
    host, peers, update = together("--ignore-prefix-size", "2")
    sample = batch(host)
    _, _, log = host.step(sample, update)
    mask = sample["target"] != host.task.target_dictionary.pad()
    mask[:, :2] = False
    assert log["codistill_positions"].item() == mask.sum()
    with torch.no_grad():
        logits, peer_logits = (m.double()(**sample["net_input"])[0] for m in (host.model, peers[0]))
    wanted = expected_penalty(logits, [peer_logits], mask, "kl", 1.0).item() / math.log(2)
    assert log["codistill_loss"].item() == pytest.approx(wanted, rel=1e-4)


def test_the_sentence_average_of_the_host_keeps_its_sample_size(together):
    host, _, update = together("--sentence-avg")
    _, _, log = host.step(batch(host), update)
    assert log["sample_size"] == 6
    assert log["codistill_positions"] == log["ntokens"]


def test_validation_is_the_hosts_own_even_with_peers_at_hand(together):
    host, _, _ = together("--label-smoothing", "0.1", "--codistill-label-smoothing", "0:0.3")
    assert host.codistiller.active
    sample = batch(host)
    host.criterion.eval()
    host.model.eval()
    loss, size, log = host.task.valid_step(sample, host.model, host.criterion)
    wanted, wanted_size, wanted_log = plain(host, label_smoothing=0.1)(host.model, sample)
    assert loss == wanted
    assert size == wanted_size
    assert log == wanted_log


@pytest.mark.parametrize(
    ("schedule", "update", "epoch", "epsilon"),
    [
        ("0:0.2,2:0.05", 9, 1, 0.2),
        ("0:0.2,2:0.05", 9, 2, 0.2),
        ("0:0.2,2:0.05", 9, 3, 0.05),
        ("0:0.2,10u:0", 9, 5, 0.2),
        ("0:0.2,10u:0", 10, 1, 0.0),
    ],
)
def test_scheduled_label_smoothing_is_trained_with_and_not_logged(hosts, schedule, update, epoch, epsilon):  # noqa: F811
    flags = ("--codistill-peers", "1", "--label-smoothing", "0.1", "--codistill-label-smoothing", schedule)
    host = hosts(0, *flags)
    host.task.begin_epoch(epoch, host.model)
    sample = batch(host)
    found, gradients, log = host.step(sample, update)
    assert log["loss"] == plain(host, label_smoothing=0.1)(host.model, sample)[0]
    host.optimizer.zero_grad()
    wanted, _, _ = plain(host, label_smoothing=epsilon)(host.model, sample)
    wanted.backward()
    assert found == wanted.item()
    for name, parameter in host.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)


def test_a_batch_that_only_keeps_a_worker_in_step_has_no_penalty(together):
    host, _, update = together()
    found, gradients, log = host.step(batch(host), update, ignore_grad=True)
    assert found == 0
    assert log["codistill_positions"] == 0
    assert all(gradient.eq(0).all() for gradient in gradients.values())


def kinds(log):
    return {
        name: (value.dtype, value.device, value.shape) if torch.is_tensor(value) else type(value)
        for name, value in log.items()
    }


def test_what_is_logged_is_of_the_same_kinds_with_a_penalty_and_without(together, hosts):  # noqa: F811
    """fairseq adds up the tensors of all workers in one buffer and their numbers in another."""
    host, _, update = together()
    with_a_penalty = kinds(host.step(batch(host), update)[2])
    assert kinds(host.step(batch(host), update, ignore_grad=True)[2]) == with_a_penalty
    alone = hosts(0, "--codistill-peers", "1")
    assert kinds(alone.step(batch(alone), 0)[2]) == with_a_penalty


def test_metrics_are_means_over_target_tokens_and_have_one_shape_with_and_without_a_penalty(together, hosts):  # noqa: F811
    host, _, update = together()
    logs = [host.step(batch(host, pairs), update)[2] for pairs in (sentences(3), sentences(5, seed=1))]
    with metrics.aggregate(new_root=True) as found:
        host.criterion.reduce_metrics(logs)
    positions = sum(log["ntokens"] for log in logs)
    total = sum(log["codistill_loss"].item() for log in logs)
    assert found["codistill_loss"].avg == pytest.approx(total / positions)
    assert 0 <= found["codistill_agreement"].avg <= 1

    alone = hosts(0, "--codistill-peers", "1")
    with metrics.aggregate(new_root=True) as without:
        alone.criterion.reduce_metrics([alone.step(batch(alone), 0)[2]])
    per_update = {f"codistill_{key}" for key in KEYS} - {"codistill_loss", "codistill_agreement"}
    assert without.keys() - per_update == found.keys()
    assert per_update <= without.keys()
    assert without["codistill_loss"].avg == 0


def test_validation_logs_nothing_of_ours(hosts):  # noqa: F811
    host = hosts(0, "--codistill-peers", "1")
    host.criterion.eval()
    _, _, log = host.task.valid_step(batch(host), host.model.eval(), host.criterion)
    with metrics.aggregate(new_root=True) as found:
        host.criterion.reduce_metrics([log])
    assert not any(key.startswith("codistill") for key in found)
