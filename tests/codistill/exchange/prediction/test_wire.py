from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from codistill.exchange.prediction import wire
from codistill.exchange.snapshot import WIRE_DTYPES
from codistill.losses import distill

DTYPES = list(WIRE_DTYPES)


def logits(*shape: int, seed: int = 0, scale: float = 3.0, offset: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale + offset


def travelled(own: Tensor, dtype: str = "float32", topk: int = 0) -> Tensor:
    payload = wire.encode(own, dtype, topk)
    assert (payload.dtype, payload.device.type, payload.dim()) == (torch.uint8, "cpu", 1)
    assert payload.numel() == wire.payload_bytes(own.shape, dtype, topk)
    return wire.decode(payload.clone(), own, dtype, topk)


@pytest.mark.parametrize("shape", [(6, 11), (2, 3, 11), (11,), (0, 11), (2, 0, 11), (4, 1)])
@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_every_shape_arrive_in_that_shape_as_float32(shape: tuple[int, ...], dtype: str, topk: int) -> None:
    own = logits(*shape)
    found = travelled(own, dtype, topk)
    assert (found.shape, found.dtype) == (own.shape, torch.float32)
    most = min(4, shape[-1])
    assert torch.allclose(found.topk(most).values, own.topk(most).values, rtol=2**-8, atol=2**-8 * 20)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float32_on_the_wire_is_exact(own: torch.dtype) -> None:
    sent = logits(5, 7).to(own)
    assert torch.equal(travelled(sent), sent.float())


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_that_have_the_precision_of_the_wire_arrive_exactly(dtype: str, topk: int) -> None:
    sent = logits(50, 7, offset=40).to(WIRE_DTYPES[dtype])
    found = travelled(sent, dtype, topk)
    assert torch.equal(found.topk(topk or 7).values, sent.float().topk(topk or 7).values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_large_offset_common_to_all_classes_costs_no_precision(dtype: str) -> None:
    own = logits(100, 30, offset=3000)
    exact, found = own.softmax(-1), travelled(own, dtype).softmax(-1)
    assert (exact - found).abs().max() < 0.004
    assert (exact - own.to(WIRE_DTYPES[dtype]).float().softmax(-1)).abs().max() > 0.02  # what plain rounding would cost


def test_logits_beyond_the_range_of_float16_arrive_finite() -> None:
    own = logits(4, 9, offset=1e5)
    found = travelled(own, "float16")
    assert torch.allclose(found, own, rtol=0, atol=0.02)


@pytest.mark.parametrize("topk", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_and_sliced_logits_arrive_as_what_they_are(dtype: str, topk: int) -> None:
    whole = logits(5, 4, 12)
    for own in (whole.transpose(0, 1), whole[:, ::2], whole[..., 1:10]):
        assert torch.equal(travelled(own, dtype, topk), travelled(own.contiguous(), dtype, topk))


@pytest.mark.parametrize("topk", [5, 6, 1000])
def test_as_many_logits_as_there_are_classes_are_all_of_them(topk: int) -> None:
    own = logits(3, 5)
    assert torch.equal(wire.encode(own, "float32", topk), wire.encode(own, "float32", 0))
    assert torch.equal(travelled(own, "float32", topk), own)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logits_take_the_room_of_those_only(dtype: str) -> None:
    width = WIRE_DTYPES[dtype].itemsize
    each = 8 * (4 + width) + 4 + (4 if width == 2 else 0)
    assert wire.payload_bytes((2, 3, 32000), dtype, 8) == 6 * each


def test_the_softmax_of_the_largest_and_the_mass_of_the_rest_are_right() -> None:
    own = logits(40, 500)
    exact, found = own.double().softmax(-1), travelled(own, topk=9).double().softmax(-1)
    chosen = own.topk(9).indices
    assert torch.allclose(found.gather(-1, chosen), exact.gather(-1, chosen), rtol=1e-5)
    rest = torch.ones_like(exact, dtype=torch.bool).scatter(-1, chosen, False)
    assert torch.allclose((found * rest).sum(-1), (exact * rest).sum(-1), rtol=1e-5)
    others = found[rest].view(40, 491)
    assert torch.equal(others, others[:, :1].expand_as(others))


def test_a_rest_too_small_for_a_difference_of_sums_is_still_right() -> None:
    own = torch.full((1, 100), -40.0)
    own[0, :2] = torch.tensor([30.0, 29.0])
    assert torch.allclose(travelled(own, topk=2), own, rtol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_of_the_reconstruction_is_off_by_the_shape_of_the_rest_alone(seed: int) -> None:
    draw = random.Random(seed)
    classes, scale = draw.randint(50, 4000), draw.uniform(0.3, 5)
    topk = draw.randint(1, classes - 1)
    peer, own = logits(30, classes, seed=seed, scale=scale), logits(30, classes, seed=seed + 100)
    found = travelled(peer, topk=topk)

    rest = torch.ones(30, classes, dtype=torch.bool).scatter(-1, peer.topk(topk).indices, False)
    p, log_q = peer.double().softmax(-1)[rest].view(30, -1), own.double().log_softmax(-1)[rest].view(30, -1)
    mass, even = p.sum(-1), 1 / p.shape[-1]
    within = p / mass[:, None]
    cross = -(within * log_q).sum(-1) + (even * log_q).sum(-1)
    entropy = -torch.special.entr(within).sum(-1) - math.log(even)

    def loss(kind: str, logits: Tensor) -> float:
        return distill(own, [logits], loss=kind).loss.item()

    expected = (mass * (entropy + cross)).sum().item()
    assert loss("kl", peer) - loss("kl", found) == pytest.approx(expected, rel=1e-3, abs=2e-3)
    assert loss("ce", peer) - loss("ce", found) == pytest.approx((mass * cross).sum().item(), rel=1e-3, abs=2e-3)
    bound = mass * (math.log(p.shape[-1]) + log_q.amax(-1) - log_q.amin(-1))
    assert abs(expected) <= bound.sum()


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["largest", "least"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_arrive_as_not_finite(value: float, place: str, dtype: str, topk: int) -> None:
    own = logits(4, 20)
    own[2, own[2].argmax() if place == "largest" else own[2].argmin()] = value
    finite = travelled(own, dtype, topk).isfinite().all(-1)
    assert finite.tolist() == [True, True, False, True]
    assert distill(logits(4, 20, seed=1), [travelled(own, dtype, topk)], loss="kl").peers == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [(-1, 4, 7), (1, 4, 20), (1, 4, 2**31 - 1), (-(2**31), 4, 7), (4, 4, 7), (7, 4, 1)])
def test_classes_that_do_not_exist_or_come_twice_make_their_position_nan(classes: tuple[int, ...], dtype: str) -> None:
    own = logits(3, 20)
    payload = wire.encode(own, dtype, 3)
    honest = wire.decode(payload, own, dtype, 3)
    start = (2 if dtype != "float32" else 1) * 3 * 4
    payload[start : start + 3 * 3 * 4].view(torch.int32).view(3, 3)[1] = torch.tensor(classes, dtype=torch.int32)
    found = wire.decode(payload, own, dtype, 3)
    assert found[1].isnan().any()
    assert torch.equal(found[[0, 2]], honest[[0, 2]])
    assert distill(own, [found], loss="kl").peers == 0


def test_classes_whose_differences_wrap_make_their_position_nan() -> None:
    own = logits(1, 20)
    payload = wire.encode(own, "float32", 5)
    payload[4:24].view(torch.int32).copy_(torch.tensor([0, 2**31 - 1, -(2**31), -1, 5]))
    assert wire.decode(payload, own, "float32", 5).isnan().any()


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bytes_of_the_right_number_are_logits_of_the_right_shape(dtype: str, topk: int) -> None:
    own = logits(7, 20)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        payload = torch.randint(256, (wire.payload_bytes(own.shape, dtype, topk),), generator=generator)
        assert wire.decode(payload.to(torch.uint8), own, dtype, topk).shape == own.shape


@pytest.mark.parametrize("change", [lambda sent: sent[:-1], lambda sent: torch.cat([sent, sent[:1]]), Tensor.int])
def test_a_payload_of_another_size_is_an_error(change: Callable[[Tensor], Tensor]) -> None:
    own = logits(3, 20)
    with pytest.raises(ValueError, match=r"payload has shape .*, not \(\d+,\) and torch.uint8"):
        wire.decode(change(wire.encode(own, "bfloat16", 3)), own, "bfloat16", 3)


def test_encoding_leaves_own_logits_and_random_numbers_alone() -> None:
    own = logits(6, 30).requires_grad_()
    before, state = own.detach().clone(), torch.get_rng_state()
    for dtype in DTYPES:
        for topk in (0, 5):
            assert not travelled(own, dtype, topk).requires_grad
    assert torch.equal(own, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_positions_are_encoded_in_blocks_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = logits(50, 13)
    once = [wire.encode(own, dtype, topk) for dtype in DTYPES for topk in (0, 4)]
    monkeypatch.setattr(wire, "_BLOCK", 40)
    assert all(
        torch.equal(a, wire.encode(own, dtype, topk))
        for a, (dtype, topk) in zip(once, [(d, k) for d in DTYPES for k in (0, 4)], strict=True)
    )


IMAGES = logits(4, 3, 8, 8)
TOKENS = torch.tensor([[5, 6, 7, 2, 1], [8, 9, 2, 1, 1], [4, 3, 3, 9, 2]])


@pytest.fixture(params=["exact", "table"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes these small inputs go the way of large ones too."""
    if request.param == "table":
        monkeypatch.setattr(wire, "_EXACT_BYTES", 0)
        monkeypatch.setattr(wire, "_ROW_BYTES", 64)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(
    "other",
    [
        IMAGES.flip(0),
        IMAGES.flip(-1),
        IMAGES.flip(-2),
        IMAGES[[0, 1, 3, 2]],
        IMAGES[:3],
        IMAGES.roll(1, -1),
        IMAGES.double(),
        IMAGES.bfloat16(),
        IMAGES.view(4, 3, 64),
        IMAGES.view(2, 6, 8, 8),
        IMAGES * 1.0000002,
        0.9 * IMAGES + 0.1 * IMAGES.flip(0),
        torch.zeros_like(IMAGES),
    ],
)
def test_other_images_have_another_checksum(other: Tensor) -> None:
    assert wire.checksum([other]) != wire.checksum([IMAGES])


@pytest.mark.parametrize(
    "other",
    [
        TOKENS[[1, 0, 2]],
        TOKENS[:, [1, 0, 2, 3, 4]],
        TOKENS.flip(1),
        TOKENS[:, :4],
        torch.nn.functional.pad(TOKENS, (0, 1), value=1),
        TOKENS.where(TOKENS != 9, 10),
        TOKENS.int(),
        TOKENS.t(),
        TOKENS.flatten(),
    ],
)
def test_other_tokens_have_another_checksum(other: Tensor) -> None:
    assert wire.checksum([other]) != wire.checksum([TOKENS])


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int16, torch.int32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 7), (3, 8), (5,), (8,)])
def test_a_change_of_one_element_of_any_dtype_is_noticed(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    one = (logits(*shape).abs() * 20).to(dtype)
    other = one.clone()
    other.view(-1)[3] = 1 - other.view(-1)[3].float()
    assert wire.checksum([one]) != wire.checksum([other])


def test_the_number_and_order_of_inputs_count() -> None:
    sums = {wire.checksum(inputs) for inputs in ([], [TOKENS], [TOKENS, IMAGES], [IMAGES, TOKENS], [TOKENS, TOKENS])}
    assert len(sums) == 5


def test_inputs_without_elements_or_dimensions_have_checksums() -> None:
    odd = [torch.zeros(0), torch.zeros(0, 4), torch.zeros(4, 0), torch.tensor(3.0), torch.tensor(True)]
    assert len({wire.checksum([one]) for one in odd}) == len(odd)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("inputs", [IMAGES, TOKENS, TOKENS.bool(), IMAGES.bfloat16(), torch.complex(IMAGES, -IMAGES)])
def test_the_checksum_is_the_same_for_every_layout_and_call(inputs: Tensor) -> None:
    wanted = wire.checksum([inputs])
    assert -(2**63) <= wanted < 2**63
    assert wire.checksum([inputs.clone()]) == wanted
    assert wire.checksum([inputs.transpose(0, 1).contiguous().transpose(0, 1)]) == wanted
    shifted = torch.cat([inputs.flatten()[:1], inputs.flatten()])[1:].view(inputs.shape)
    assert wire.checksum([shifted]) == wanted
    if inputs.dim() == 4:
        assert wire.checksum([inputs.to(memory_format=torch.channels_last)]) == wanted


def test_random_batches_do_not_share_a_checksum() -> None:
    generator = torch.Generator().manual_seed(0)
    found = {wire.checksum([torch.randint(4, (3, 4), generator=generator)]) for _ in range(3000)}
    assert len(found) > 2995  # of 4**12 batches, drawing one twice is rare


def test_large_inputs_that_differ_in_one_bit_or_in_order_are_told_apart() -> None:
    large = logits(6, 3, 150, 149)
    assert large.nbytes > wire._EXACT_BYTES
    bit = large.clone()
    bit.view(-1).view(torch.int32)[123456] ^= 1
    last = large.clone()
    last.view(-1)[-1] += 1
    others = [bit, last, large.flip(0), large.flip(-1), large.roll(1, 0), large[[1, 0, 2, 3, 4, 5]]]
    assert len({wire.checksum([one]) for one in (large, *others)}) == 1 + len(others)
    assert wire.checksum([large.to(memory_format=torch.channels_last)]) == wire.checksum([large])
