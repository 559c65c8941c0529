import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from codistill.config import LOSSES
from codistill.losses import distill

TERMS = [("kl", 1.0), ("kl", 2.5), ("ce", 1.0), ("ce", 2.5), ("mse", 1.0)]
NAN, INF = math.nan, math.inf

each_loss = pytest.mark.parametrize(("loss", "temperature"), TERMS)


def logits(*shape, seed=0, scale=2.0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def expected(own, peers, *, loss, temperature=1.0, mask=None):
    """The penalty written down from its definition: one position at a time, in float64, with autograd."""
    own = own.detach().double().requires_grad_()
    total = own.sum() * 0.0
    positions = torch.ones(own.shape[:-1], dtype=torch.bool) if mask is None else mask
    for index in positions.nonzero().tolist():
        at = tuple(index)
        for peer in peers:
            y, x = peer.detach()[at].double(), own[at]
            p, q = (y / temperature).exp(), (x / temperature).exp()
            p, q = p / p.sum(), q / q.sum()
            distance = {
                "kl": temperature**2 * (p * (p / q).log()).sum(),
                "ce": -(temperature**2) * (p * q.log()).sum(),
                "mse": ((x - y) ** 2).sum() / len(x),
            }[loss]
            total = total + distance / len(peers)
    (gradient,) = torch.autograd.grad(total, own)
    return total.detach(), gradient


def taken(own, peers, **terms):
    """Loss and gradient as distill gives them."""
    own = own.detach().clone().requires_grad_()
    found = distill(own, peers, **terms)
    (gradient,) = torch.autograd.grad(found.loss, own)
    return found, gradient


def assert_close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


class Watch(TorchDispatchMode):
    """Keeps the storage of every tensor made of at least `least` bytes, and the name of every operator."""

    def __init__(self, least, known=()):
        super().__init__()
        self.least, self.operators, self.kept = least, set(), {}
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operators.add(operator.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.least and storage.data_ptr() not in self.known:
                    self.kept[storage.data_ptr()] = storage
        return result


@each_loss
def test_over_a_peers_logits_the_gradient_is_the_same_and_no_tensor_of_their_size_is_made(loss, temperature):
    own, mask = logits(64, 512), torch.arange(64) % 5 != 0
    terms = {"loss": loss, "temperature": temperature, "mask": mask, "chunk": 4}
    wanted, gradient = taken(own, [logits(64, 512, seed=1), logits(64, 512, seed=2)], **terms)
    peers = [logits(64, 512, seed=1).t().contiguous().t(), logits(64, 512, seed=2)]  # only the second lies in order
    own.requires_grad_()
    with Watch(own.nbytes, known=[own, *peers]) as watch:
        found = distill(own, peers, overwrite=True, **terms)
    assert not watch.kept
    (over,) = torch.autograd.grad(found.loss, own)
    assert torch.equal(over, gradient)
    assert torch.equal(found.loss, wanted.loss)
    assert over.data_ptr() == peers[1].data_ptr()
    assert torch.equal(peers[0], logits(64, 512, seed=1))


def test_logits_that_cannot_be_written_to_as_a_gradient_are_left_alone():
    own, plain = logits(8, 16), logits(8, 16, seed=1)
    with torch.inference_mode():
        inference = plain.clone()
    for peer in (inference, plain[0].expand(8, 16), plain.double()):
        before = peer.clone()
        wanted, gradient = taken(own, [peer], loss="kl")
        found, over = taken(own, [peer], loss="kl", overwrite=True)
        assert torch.equal(found.loss, wanted.loss)
        assert torch.equal(over, gradient)
        assert torch.equal(peer, before)


# --- values and gradients -------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_equal_a_float64_computation(loss, temperature, count, masked, dtype):
    own = logits(3, 5, 7, dtype=dtype)
    peers = [logits(3, 5, 7, seed=1 + peer, dtype=dtype) for peer in range(count)]
    mask = logits(3, 5, seed=9) > 0 if masked else None
    terms = {"loss": loss, "temperature": temperature, "mask": mask}
    found, gradient = taken(own, peers, **terms)
    wanted, wanted_gradient = expected(own, peers, **terms)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(found.loss, wanted, tolerance)
    assert_close(gradient, wanted_gradient, tolerance)
    assert found.loss.dtype == gradient.dtype == dtype
    assert found.peers == count
    assert found.positions == (15 if mask is None else mask.sum())


class TakenAgain(torch.autograd.Function):
    """distill for gradcheck, which asks the same graph more than once."""

    @staticmethod
    def forward(ctx, own, peer, terms):
        ctx.save_for_backward(own, peer)
        ctx.terms = terms
        return distill(own, [peer], **terms).loss

    @staticmethod
    def backward(ctx, gradient):
        own, peer = ctx.saved_tensors
        with torch.enable_grad():
            return gradient * taken(own, [peer], **ctx.terms)[1], None, None


@each_loss
def test_the_gradient_equals_finite_differences(loss, temperature):
    own, peer = logits(4, 5, dtype=torch.float64).requires_grad_(), logits(4, 5, seed=1, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    terms = {"loss": loss, "temperature": temperature, "mask": mask, "chunk": 2}
    assert torch.autograd.gradcheck(lambda logits: TakenAgain.apply(logits, peer, terms), (own,))


@each_loss
def test_the_gradient_is_scaled_by_what_comes_from_above(loss, temperature):
    own, peers = logits(6, 7).requires_grad_(), [logits(6, 7, seed=1)]
    (0.25 * distill(own, peers, loss=loss, temperature=temperature).loss).backward()
    assert_close(own.grad, 0.25 * expected(own, peers, loss=loss, temperature=temperature)[1])


@each_loss
def test_a_peer_that_agrees_perfectly_pulls_nowhere(loss, temperature):
    own = logits(6, 7)
    found, gradient = taken(own, [own.clone()], loss=loss, temperature=temperature)
    assert gradient.abs().max() == 0
    assert found.agreement == 6
    if loss != "ce":
        assert_close(found.loss, torch.tensor(0.0))


def test_agreement_counts_equal_largest_logits_over_positions_and_averages_over_peers():
    own, peers = logits(40, 3), [logits(40, 3, seed=1), logits(40, 3, seed=2)]
    mask = logits(40, seed=3) > 0
    same = [((own.argmax(-1) == peer.argmax(-1)) & mask).sum().item() for peer in peers]
    for loss in LOSSES:
        assert distill(own, peers, loss=loss, mask=mask).agreement == sum(same) / 2


def test_logits_that_tie_agree_when_they_share_a_largest_class():
    own = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    peer = torch.tensor([[0.0, 2.0, 2.0], [0.0, 0.0, 2.0]])
    assert distill(own, [peer], loss="kl").agreement == 1


# --- what must not matter -------------------------------------------------------------------------------------------

batches = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 9), st.integers(1, 3), st.integers(0, 10**6))
some_terms = st.sampled_from(TERMS)


def batch(drawn):
    size, length, classes, count, seed = drawn
    lengths = torch.randint(1, length + 1, (size,), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(length) < lengths[:, None]
    return (
        logits(size, length, classes, seed=seed),
        [logits(size, length, classes, seed=seed + 1 + peer) for peer in range(count)],
        mask,
    )


@settings(deadline=None)
@given(batches, some_terms, st.sampled_from([0.0, 1e30, NAN, INF, -INF]))
def test_padding_changes_nothing(drawn, terms, filling):
    own, peers, mask = batch(drawn)
    loss, temperature = terms
    bare, bare_gradient = taken(own[mask], [peer[mask] for peer in peers], loss=loss, temperature=temperature)
    padded = [torch.where(mask[..., None], tensor, filling) for tensor in (own, *peers)]
    found, gradient = taken(padded[0], padded[1:], loss=loss, temperature=temperature, mask=mask)
    assert_close(found.loss, bare.loss)
    assert_close(gradient[mask], bare_gradient)
    assert gradient[~mask].eq(0).all()
    assert (found.agreement, found.positions, found.peers) == (bare.agreement, bare.positions, bare.peers)


@settings(deadline=None)
@given(batches, some_terms)
def test_the_order_of_positions_and_of_peers_changes_nothing(drawn, terms):
    own, peers, mask = batch(drawn)
    loss, temperature = terms
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(drawn[-1]))
    found, gradient = taken(own, peers, loss=loss, temperature=temperature, mask=mask)
    other, other_gradient = taken(
        own[order], [peer[order] for peer in reversed(peers)], loss=loss, temperature=temperature, mask=mask[order]
    )
    assert_close(found.loss, other.loss)
    assert_close(gradient[order], other_gradient)
    assert_close(found.agreement, other.agreement)


@settings(deadline=None)
@given(batches, some_terms, st.integers(1, 30))
def test_the_size_of_chunks_changes_nothing(drawn, terms, chunk):
    own, peers, mask = batch(drawn)
    loss, temperature = terms
    whole, whole_gradient = taken(own, peers, loss=loss, temperature=temperature, mask=mask)
    cut, cut_gradient = taken(own, peers, loss=loss, temperature=temperature, mask=mask, chunk=chunk)
    assert_close(cut.loss, whole.loss, 1e-6)
    assert_close(cut_gradient, whole_gradient, 1e-6)
    assert cut.agreement == whole.agreement


@settings(deadline=None)
@given(batches, some_terms, st.integers(0, 4))
def test_the_penalties_of_parts_of_a_batch_add_up_to_that_of_the_whole(drawn, terms, cut):
    own, peers, mask = batch(drawn)
    loss, temperature = terms
    whole, whole_gradient = taken(own, peers, loss=loss, temperature=temperature, mask=mask)
    parts = [
        taken(own[part], [peer[part] for peer in peers], loss=loss, temperature=temperature, mask=mask[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert_close(sum(found.loss for found, _ in parts), whole.loss)
    assert_close(torch.cat([gradient for _, gradient in parts]), whole_gradient)
    assert_close(sum(found.agreement for found, _ in parts), whole.agreement)
    assert sum(found.positions for found, _ in parts) == whole.positions


@pytest.mark.parametrize(("loss", "temperature"), [terms for terms in TERMS if terms[0] != "mse"])
def test_a_common_offset_of_a_models_logits_costs_no_precision_in_the_softmaxes(loss, temperature):
    own, peer = torch.randint(-3, 4, (2, 8, 9), generator=torch.Generator().manual_seed(0)).float()
    found, gradient = taken(own + 2.0**16, [peer - 2.0**16], loss=loss, temperature=temperature)
    wanted, wanted_gradient = taken(own, [peer], loss=loss, temperature=temperature)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(gradient, wanted_gradient)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (3, 0, 7), (2, 3, 4, 7)])
@each_loss
def test_any_number_of_leading_dimensions_will_do(shape, loss, temperature):
    own, peer = logits(*shape), logits(*shape, seed=1)
    found, gradient = taken(own, [peer], loss=loss, temperature=temperature, chunk=2)
    wanted, wanted_gradient = expected(own.view(-1, 7), [peer.view(-1, 7)], loss=loss, temperature=temperature)
    assert_close(found.loss, wanted)
    assert_close(gradient, wanted_gradient.view(shape))
    assert found.positions == math.prod(shape[:-1])


@each_loss
def test_neither_layout_nor_the_graph_around_own_matters(loss, temperature):
    base, peer = logits(5, 4, 7).requires_grad_(), logits(3, 5, 7, seed=1)
    own = base.transpose(0, 1)[1:]
    distill(own, [peer], loss=loss, temperature=temperature, chunk=2).loss.backward()
    wanted = expected(own, [peer], loss=loss, temperature=temperature)[1]
    assert_close(base.grad.transpose(0, 1)[1:], wanted)
    assert base.grad[:, 0].eq(0).all()


# --- a peer can never hurt ------------------------------------------------------------------------------------------


@each_loss
def test_no_gradient_reaches_a_peer(loss, temperature):
    own, peer = logits(4, 5).requires_grad_(), logits(4, 5, seed=1).requires_grad_()
    distill(own, [peer], loss=loss, temperature=temperature).loss.backward()
    assert own.grad is not None
    assert peer.grad is None
    assert not distill(own.detach(), [peer], loss=loss, temperature=temperature).loss.requires_grad


@each_loss
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_peer_that_is_not_finite_is_left_out_and_the_others_count(loss, temperature, poison, bad):
    own, peers = logits(6, 7), [logits(6, 7, seed=1 + peer) for peer in range(3)]
    peers[bad][4, 2] = poison
    good = [peer for index, peer in enumerate(peers) if index != bad]
    found, gradient = taken(own, peers, loss=loss, temperature=temperature, chunk=2)
    wanted, wanted_gradient = taken(own, good, loss=loss, temperature=temperature, chunk=2)
    assert_close(found.loss, wanted.loss)
    assert_close(gradient, wanted_gradient)
    assert (found.agreement, found.peers) == (wanted.agreement, 2)


@each_loss
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("count", [1, 2])
def test_without_a_finite_peer_loss_and_gradient_are_zero(loss, temperature, poison, count):
    peers = [logits(6, 7, seed=1 + peer) for peer in range(count)]
    for peer in peers:
        peer[3] = poison
    found, gradient = taken(logits(6, 7), peers, loss=loss, temperature=temperature)
    assert (found.loss, found.agreement, found.peers, found.positions) == (0, 0, 0, 6)
    assert gradient.eq(0).all()


@each_loss
def test_no_peers_at_all_give_zero(loss, temperature):
    found, gradient = taken(logits(6, 7), [], loss=loss, temperature=temperature)
    assert (found.loss, found.agreement, found.peers, found.positions) == (0, 0, 0, 6)
    assert gradient.eq(0).all()


@each_loss
def test_what_is_masked_may_be_garbage(loss, temperature):
    own, peer = logits(6, 7), logits(6, 7, seed=1)
    mask = torch.tensor([True, False, True, False, False, True])
    wanted, wanted_gradient = expected(own, [peer], loss=loss, temperature=temperature, mask=mask)
    for poison in (NAN, INF, -INF):
        own[~mask], peer[~mask] = poison, -poison
        found, gradient = taken(own, [peer], loss=loss, temperature=temperature, mask=mask)
        assert found.peers == 1
        assert_close(found.loss, wanted)
        assert_close(gradient, wanted_gradient)


@each_loss
def test_a_batch_of_padding_alone_gives_zero(loss, temperature):
    own, peer = torch.full((3, 7), NAN), torch.full((3, 7), INF)
    found, gradient = taken(own, [peer], loss=loss, temperature=temperature, mask=torch.zeros(3, dtype=torch.bool))
    assert (found.loss, found.agreement, found.positions, found.peers) == (0, 0, 0, 1)
    assert gradient.eq(0).all()


@each_loss
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_our_own_non_finite_logits_come_out_for_the_host_to_see(loss, temperature, poison):
    own = logits(6, 7)
    own[2, 3] = poison
    found, gradient = taken(own, [logits(6, 7, seed=1)], loss=loss, temperature=temperature)
    assert not found.loss.isfinite()
    assert found.peers == 1
    if not (poison == -INF and loss != "mse"):  # there the softmax is well defined
        assert not gradient[2].isfinite().all()
    assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


def test_classes_that_both_models_rule_out_with_the_lowest_number_are_fine():
    own, peer = logits(6, 7), logits(6, 7, seed=1)
    own[:, 2], peer[:, 2] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    found, gradient = taken(own, [peer], loss="kl")
    others = [0, 1, 3, 4, 5, 6]
    wanted, wanted_gradient = expected(own[:, others], [peer[:, others]], loss="kl")
    assert found.peers == 1
    assert_close(found.loss, wanted)
    assert_close(gradient[:, others], wanted_gradient)


def test_a_finite_peer_that_would_leave_float32_is_left_out():
    peer = logits(6, 7)
    peer[1, 2] = torch.finfo(torch.float32).min
    found, gradient = taken(logits(6, 7), [peer], loss="kl", temperature=0.5)
    assert (found.loss, found.peers) == (0, 0)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("offset", [1e20, -1e20, 3e38])
def test_a_finite_peer_whose_squares_would_leave_float32_is_left_out(offset):
    own, whole = logits(6, 7), logits(6, 7, seed=2)
    found, gradient = taken(own, [logits(6, 7, seed=1) + offset, whole], loss="mse")
    wanted, wanted_gradient = expected(own, [whole], loss="mse")
    assert found.peers == 1
    assert_close(found.loss, wanted)
    assert_close(gradient, wanted_gradient)


def test_a_peer_beyond_what_our_own_precision_holds_is_left_out_before_the_gradient_leaves_it():
    found, gradient = taken(logits(6, 7, dtype=torch.float16), [logits(6, 7, seed=1) + 1e6], loss="mse")
    assert (found.loss, found.peers) == (0, 0)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_logits_that_count_with_mse_give_a_finite_loss_and_gradient(sign):
    found, gradient = taken(logits(300, 500), [torch.full((300, 500), sign * 2.0**40)] * 3, loss="mse")
    assert found.peers == 3
    assert found.loss.isfinite()
    assert gradient.isfinite().all()


# --- precision ------------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-10)])
def test_half_precision_logits_are_compared_in_float32(loss, temperature, dtype, tolerance):
    own, peers = logits(6, 7, dtype=dtype), [logits(6, 7, seed=1, dtype=dtype), logits(6, 7, seed=2)]
    found, gradient = taken(own, peers, loss=loss, temperature=temperature, chunk=4)
    wanted, wanted_gradient = expected(own, peers, loss=loss, temperature=temperature)
    assert (found.loss.dtype, gradient.dtype) == (torch.float32, dtype)
    assert_close(found.loss, wanted)
    torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=2 * tolerance, atol=1e-6)


def test_large_float16_logits_do_not_overflow():
    own, peer = torch.zeros(1, 4).half(), torch.zeros(1, 4).half()
    own[0, 0], own[0, 1], peer[0, 0], peer[0, 1] = 60000, -60000, -60000, 60000
    found, gradient = taken(own, [peer], loss="kl")
    assert found.loss == 120000
    assert gradient.tolist() == [[1.0, -1.0, 0.0, 0.0]]
    found, gradient = taken(own, [peer] * 3, loss="mse")
    assert found.loss == 2 * 120000**2 / 4
    assert gradient.tolist() == [[60000.0, -60000.0, 0.0, 0.0]]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_float16_gradients_of_small_probabilities_survive_until_the_loss_scale(count):
    own, peers = logits(4, 20000, dtype=torch.float16), [logits(4, 20000, seed=1 + peer) for peer in range(count)]
    own.requires_grad_()
    (distill(own, peers, loss="kl").loss * 2.0**12).backward()
    wanted = expected(own, peers, loss="kl")[1] * 2.0**12
    torch.testing.assert_close(own.grad.double(), wanted, rtol=2.0**-9, atol=2.0**-20)


@each_loss
def test_autocast_changes_nothing(loss, temperature):
    own, peer = logits(6, 7), logits(6, 7, seed=1)
    wanted, wanted_gradient = taken(own, [peer], loss=loss, temperature=temperature)
    with torch.autocast("cpu", torch.bfloat16):
        found, gradient = taken(own, [peer], loss=loss, temperature=temperature)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(gradient, wanted_gradient)


# --- cost -----------------------------------------------------------------------------------------------------------


@contextmanager
def watched(own, peers):
    with Watch(least=own.nbytes // 2, known=[own, *peers]) as watch:
        yield watch


def layouts(dtype):
    base = logits(16, 13, 50, dtype=dtype)
    yield "contiguous", base
    yield "transposed", base.transpose(0, 1)
    yield "sliced", logits(16, 14, 50, dtype=dtype)[:, :-1]


@each_loss
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_extra_tensor_of_the_logits_size_is_all_a_gradient_needs(loss, temperature, layout, dtype):
    own = dict(layouts(dtype))[layout].detach().requires_grad_()
    peers = [logits(*own.shape, seed=1, dtype=dtype), logits(*own.shape, seed=2, dtype=dtype)]
    mask = logits(*own.shape[:-1], seed=3) > 0
    with watched(own, peers) as watch:
        found = distill(own, peers, loss=loss, temperature=temperature, mask=mask, chunk=16)
        torch.autograd.grad(found.loss, own)
    assert [storage.nbytes() for storage in watch.kept.values()] == [own.nbytes]


@each_loss
def test_no_such_tensor_is_needed_without_a_gradient(loss, temperature):
    own, peer = logits(16, 13, 50).requires_grad_(), logits(16, 13, 50, seed=1)
    with watched(own, [peer]) as watch, torch.no_grad():
        found = distill(own, [peer], loss=loss, temperature=temperature, chunk=16)
    assert not watch.kept
    assert not found.loss.requires_grad
    with watched(own, [peer]) as watch:
        other = distill(own.detach(), [peer], loss=loss, temperature=temperature, chunk=16)
    assert not watch.kept
    assert torch.equal(found.loss, other.loss)


@each_loss
def test_nothing_asks_the_device_for_a_value(loss, temperature):
    own, peer = logits(6, 7).requires_grad_(), logits(6, 7, seed=1)
    with watched(own, [peer]) as watch:
        found = distill(own, [peer, peer], loss=loss, temperature=temperature, mask=torch.ones(6, dtype=torch.bool))
        found.loss.backward()
    assert "amax" in watch.operators
    assert not watch.operators & {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


@each_loss
def test_no_random_number_is_drawn(loss, temperature):
    before = torch.get_rng_state()
    taken(logits(6, 7), [logits(6, 7, seed=1)], loss=loss, temperature=temperature)
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loss": "l2"}, "loss 'l2' is not one of kl, mse, ce"),
        ({"temperature": 0.0}, "temperature 0.0 is not a finite number above 0"),
        ({"temperature": NAN}, "temperature nan is not a finite number above 0"),
        ({"temperature": INF}, "temperature inf is not a finite number above 0"),
        (
            {"loss": "mse", "temperature": 2.0},
            "temperature 2.0 has no meaning for mse, which compares logits as they are: use 1",
        ),
        ({"chunk": 0}, "chunk 0 is not at least 1 position"),
        ({"peers": [torch.zeros(2, 3), torch.zeros(2, 4)]}, "peers[1] has shape (2, 4), own has (2, 3)"),
        (
            {"mask": torch.ones(3, dtype=torch.bool)},
            "mask has shape (3,) and torch.bool, not (2,) and torch.bool",
        ),
        ({"mask": torch.ones(2)}, "mask has shape (2,) and torch.float32, not (2,) and torch.bool"),
    ],
)
def test_arguments_that_cannot_work_get_one_line(changed, message):
    terms = {"peers": [torch.zeros(2, 3)], "loss": "kl"} | changed
    with pytest.raises(ValueError) as caught:
        distill(torch.zeros(2, 3), terms.pop("peers"), **terms)
    assert str(caught.value) == message


def test_a_gradient_can_be_taken_only_once():
    own = logits(2, 3).requires_grad_()
    found = distill(own, [logits(2, 3, seed=1)], loss="kl")
    found.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^the gradient of a penalty can be taken only once; call distill again"):
        found.loss.backward()


def test_a_gradient_of_the_gradient_is_refused():
    own = logits(2, 3).requires_grad_()
    found = distill(own, [logits(2, 3, seed=1)], loss="kl")
    with pytest.raises(RuntimeError, match=r"^a penalty has no second derivative: create_graph=True cannot be used"):
        found.loss.backward(create_graph=True)
