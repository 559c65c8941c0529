"""The kernel for GPUs gives the numbers of torch's operators: run by `test_fused.py`, with Triton interpreting it."""

import math

import pytest
import torch

from codistill import fused, losses
from codistill.losses import distill

NAN = math.nan
SHAPE = (3, 4)


@pytest.fixture
def by_kernel(monkeypatch):
    """What distill gives with the kernel, and without."""

    def both(own, peers, **terms):
        found = []
        for module in (fused, None):
            monkeypatch.setattr(losses, "_kernel", lambda *_, module=module: module)
            logits = own.clone().requires_grad_()
            one = distill(logits, [peer.clone() for peer in peers], **terms)
            (gradient,) = torch.autograd.grad(one.loss, logits)
            found.append((one.loss.detach(), one.agreement, one.positions, one.peers, gradient.float()))
        return found

    return both


def logits(seed, classes=7, dtype=torch.float32, scale=3.0):
    return (scale * torch.randn(*SHAPE, classes, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_same(found, tolerance=1e-5):
    ours, wanted = found
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("loss", "temperature"), [("kl", 1.0), ("kl", 2.5), ("ce", 1.0), ("ce", 2.5), ("mse", 1.0)])
@pytest.mark.parametrize("peers", [0, 1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_it_gives_what_torchs_operators_give(by_kernel, loss, temperature, peers, masked, overwrite):
    mask = torch.arange(12).view(SHAPE) % 3 != 0 if masked else None
    others = [logits(1 + peer) for peer in range(peers)]
    terms = {"loss": loss, "temperature": temperature, "mask": mask, "overwrite": overwrite}
    assert_same(by_kernel(logits(0), others, **terms))


@pytest.mark.parametrize("classes", [1, 2, 1000, 4096, 4097, 9000])
def test_it_takes_any_number_of_classes(by_kernel, classes):
    assert_same(by_kernel(logits(0, classes), [logits(1, classes)], loss="kl"), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_it_takes_lower_precisions(by_kernel, dtype, loss):
    others = [logits(1, dtype=dtype), logits(2, dtype=dtype), logits(3, dtype=torch.float32)]
    assert_same(by_kernel(logits(0, dtype=dtype), others, loss=loss, overwrite=True), 2e-2)


def test_pulls_too_small_for_float16_are_kept(by_kernel):
    ours, wanted = by_kernel(logits(0, 4096, torch.float16, 0.1), [logits(1, 4096, torch.float16, 0.1)], loss="kl")
    assert (ours[-1] != 0).float().mean() > 0.9
    assert_same((ours, wanted), 1e-3)


def test_a_peer_that_is_not_finite_is_left_out(by_kernel):
    broken, whole = logits(1), logits(2)
    broken[1, 2, 3] = NAN
    found = by_kernel(logits(0), [broken, whole], loss="kl", overwrite=True)
    assert_same(found)
    assert found[0][3] == 1
    assert found[0][-1].isfinite().all()


def test_a_peer_whose_squares_would_leave_float32_is_left_out(by_kernel):
    found = by_kernel(logits(0), [logits(1) + 1e20, logits(2)], loss="mse", overwrite=True)
    assert_same(found)
    assert found[0][3] == 1
    assert found[0][0].isfinite()


def test_what_a_mask_leaves_out_may_be_anything(by_kernel):
    own, peer, mask = logits(0), logits(1), torch.ones(SHAPE, dtype=torch.bool)
    own[0, 1], peer[0, 1], mask[0, 1] = NAN, math.inf, False
    found = by_kernel(own, [peer], loss="kl", mask=mask)
    assert_same(found)
    assert found[0][-1].isfinite().all()


def test_our_own_logits_that_are_not_finite_show(by_kernel):
    own = logits(0)
    own[1, 1, 1] = NAN
    assert by_kernel(own, [logits(1)], loss="kl")[0][0].isnan()


def test_ties_agree_when_they_share_a_class(by_kernel):
    own, peer = torch.zeros(3, 4), torch.zeros(3, 4)
    own[0, :2], peer[0, 1:3], own[1, 0], peer[1, 1] = 1, 1, 1, 1
    found = by_kernel(own, [peer], loss="kl")
    assert_same(found)
    assert found[0][1] == 2
