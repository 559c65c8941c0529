"""Snapshots: what goes in comes out, and what is not exactly what the reader expects is refused."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from codistill.exchange.errors import Refused
from codistill.exchange.snapshot import (
    HEADER_BYTES,
    METADATA_BYTES,
    WIRE_DTYPES,
    HostBuffer,
    Template,
    distinct,
    load,
    weights_hash,
)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


class Tied(nn.Module):
    """Embedding and output layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


def write(path: Path, state: dict[str, Tensor], dtype: str = "float32") -> Path:
    buffer = HostBuffer(state, dtype)
    buffer.fill(state)
    path.write_bytes(buffer.view())
    assert path.stat().st_size == buffer.nbytes
    return path


def pack(header: Any, payload: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header and any claim of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def refusal(path: Path, state: dict[str, Tensor], data: bytes | None = None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(Refused) as caught:
        Template(state, "float32").open(path)
    assert "\n" not in str(caught.value)
    return caught.value.cause


def same(read: dict[str, Tensor], state: dict[str, Tensor], dtype: str) -> None:
    assert read.keys() == distinct(state).keys()
    for name, tensor in read.items():
        expected = state[name].to(WIRE_DTYPES[dtype]) if state[name].is_floating_point() else state[name]
        assert tensor.dtype == expected.dtype
        assert tensor.shape == expected.shape
        assert torch.equal(tensor, expected)


STATES = {
    "linear": lambda: nn.Linear(3, 2).state_dict(),
    "buffers": lambda: nn.BatchNorm2d(3).state_dict(),
    "tied": lambda: Tied().state_dict(),
    "channels_last": lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last).state_dict(),
    "transposed": lambda: {"a": torch.randn(3, 5).t(), "b": torch.randn(6)[::2], "c": torch.randn(1, 3).expand(4, 3)},
    "empty state": dict,
    "empty tensors": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.ones(1), "d": torch.empty(0)},
    "0-dim": lambda: {"a": torch.tensor(1.5), "b": torch.tensor(7), "c": torch.tensor(True)},
    "integers": lambda: {str(dtype): torch.tensor([0, 1, 1]).to(dtype) for dtype in INTEGERS},
    "bf16": lambda: nn.Linear(3, 2, dtype=torch.bfloat16).state_dict(),
    "fp16": lambda: nn.Linear(3, 2, dtype=torch.float16).state_dict(),
    "fp64": lambda: nn.Linear(3, 2, dtype=torch.float64).state_dict(),
    "names": lambda: {"a b": torch.ones(1), 'q"\\': torch.ones(2), "\N{GREEK SMALL LETTER ALPHA}": torch.ones(3)},
}


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize("name", STATES)
def test_a_state_survives_the_round_trip(tmp_path, name, dtype):
    state = STATES[name]()
    path = write(tmp_path / "file", state, dtype)
    template = Template(state, dtype)
    assert path.stat().st_size <= template.limit
    same(template.open(path), state, dtype)


@pytest.mark.parametrize("name", STATES)
def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(tmp_path, name):
    state = STATES[name]()
    path = write(tmp_path / "ours", state)
    with safe_open(path, "pt") as file:
        theirs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    same(theirs, state, "float32")
    save_file(theirs, tmp_path / "theirs", metadata={"format": "pt"})
    same(Template(state, "float32").open(tmp_path / "theirs"), state, "float32")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=6),
    kinds=st.lists(
        st.sampled_from([*WIRE_DTYPES.values(), torch.float64, torch.int64, torch.uint8, torch.bool]), min_size=6
    ),
    dtype=st.sampled_from(sorted(WIRE_DTYPES)),
    seed=st.integers(0, 2**31),
)
def test_any_shapes_and_dtypes_survive_the_round_trip(tmp_path, shapes, kinds, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"t{i}": torch.randint(0, 200, shape, generator=generator).to(kind)
        for i, (shape, kind) in enumerate(zip(shapes, kinds, strict=False))
    }
    path = write(tmp_path / "file", state, dtype)
    tensors = Template(state, dtype).open(path)
    same(tensors, state, dtype)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


def test_what_is_tied_is_known_without_storage_too():
    with torch.device("meta"):
        tied, apart = Tied().state_dict(), nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).state_dict()
    assert distinct(tied).keys() == distinct(Tied().state_dict()).keys() == {"embed.weight"}
    assert distinct(apart).keys() == apart.keys()


def test_tied_tensors_travel_once_under_their_first_name(tmp_path):
    state = Tied().state_dict()
    assert list(distinct(state)) == ["embed.weight"]
    separate = {name: tensor.clone() for name, tensor in state.items()}
    assert list(distinct(separate)) == ["embed.weight", "out.weight"]
    views = {"whole": (whole := torch.randn(4, 4)), "part": whole[:2], "turned": whole.t()}
    assert list(distinct(views)) == ["part", "turned", "whole"]
    assert HostBuffer(state, "float32").nbytes < HostBuffer(separate, "float32").nbytes
    assert refusal(write(tmp_path / "file", state), separate) == "names"


def test_loading_fills_parameters_buffers_and_ties_and_casts(tmp_path):
    source = nn.Sequential(Tied(), nn.BatchNorm1d(4), nn.Conv2d(2, 2, 3))
    source[1].running_mean.fill_(3)
    target = nn.Sequential(Tied(), nn.BatchNorm1d(4), nn.Conv2d(2, 2, 3)).double().to(memory_format=torch.channels_last)
    path = write(tmp_path / "file", source.state_dict())
    load(target.state_dict(), Template(target.state_dict(), "float32").open(path))
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype)), name
    assert target[0].embed.weight is target[0].out.weight
    assert target[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in target.parameters())


def test_writing_to_a_mapped_snapshot_does_not_reach_the_file(tmp_path):
    state = {"a": torch.ones(4)}
    path = write(tmp_path / "file", state)
    before = path.read_bytes()
    Template(state, "float32").open(path)["a"].zero_()
    assert path.read_bytes() == before


def test_the_buffer_is_allocated_once_and_can_be_filled_again():
    state = {"a": torch.zeros(4), "b": torch.tensor(1)}
    buffer = HostBuffer(state, "float32")
    buffer.fill(state)
    view = buffer.view()
    first = bytes(view)
    buffer.fill({"a": torch.ones(4), "b": torch.tensor(2)})
    assert bytes(view) == bytes(buffer.view()) != first
    assert view.readonly
    assert (view.ndim, view.format, view.nbytes) == (1, "B", buffer.nbytes)


@pytest.mark.parametrize("state", [{}, {"a": torch.ones(1)}, {"a": torch.tensor(1.0)}, {"a": torch.ones(2, 2)}])
def test_filling_with_another_model_is_an_error(state):
    buffer = HostBuffer({"a": torch.ones(4)}, "float32")
    with pytest.raises(ValueError, match="a is not the tensor that this buffer was made for"):
        buffer.fill(state)


@pytest.mark.parametrize("tensor", [torch.ones(2, dtype=torch.complex64), torch.ones(2).to_sparse()])
def test_a_tensor_that_cannot_travel_is_an_error(tensor):
    with pytest.raises(ValueError, match="a snapshot cannot carry a: "):
        HostBuffer({"a": tensor}, "float32")


def test_nothing_tears_while_the_optimiser_keeps_stepping():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.data.zero_()
        parameter.grad = torch.ones_like(parameter)
    buffer = HostBuffer(model.state_dict(), "float32")
    digests: list[set[str]] = []
    values: list[set[float]] = []

    def hash_often(filled: threading.Event, done: threading.Event) -> None:
        filled.wait()
        view = buffer.view()
        digests.append({hashlib.sha256(view).hexdigest() for _ in range(8)})
        values.append({value for tensor in buffer._views.values() for value in tensor.unique().tolist()})
        done.set()

    for step in range(3):
        filled, done = threading.Event(), threading.Event()
        thread = threading.Thread(target=hash_often, args=(filled, done))
        thread.start()
        buffer.fill(model.state_dict())
        at_fill = model[0].weight[0, 0].item()
        filled.set()
        while not done.is_set():
            optimiser.step()
        thread.join()
        assert values[step] == {at_fill}
        assert len(digests[step]) == 1
        assert model[0].weight[0, 0].item() != at_fill


def test_a_file_cut_at_any_byte_of_its_header_or_at_any_tensor_is_refused(tmp_path):
    state = {"a": torch.ones(4), "b": torch.tensor(2.0), "c": torch.arange(3)}
    data = write(tmp_path / "file", state).read_bytes()
    payload = 8 + int.from_bytes(data[:8], "little")
    for cut in {*range(payload + 1), *range(payload, len(data), 4), len(data) - 1}:
        assert refusal(tmp_path / "file", state, data[:cut]) in ("size", "format"), cut
    assert refusal(tmp_path / "file", state, data + b"\0") == "format"


def test_any_flipped_bit_of_the_header_is_refused(tmp_path):
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    data = bytearray(write(tmp_path / "file", state).read_bytes())
    for bit in range(8 * (8 + int.from_bytes(data[:8], "little"))):
        data[bit // 8] ^= 1 << bit % 8
        assert refusal(tmp_path / "file", state, bytes(data)) in ("format", "names", "dtype", "shape", "size"), bit
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_value_that_is_not_finite_is_refused(tmp_path, dtype, value, place):
    state = {"a": torch.randn(1000), "b": torch.tensor(0)}
    state["a"][place] = value
    path = write(tmp_path / "file", state, dtype)
    with pytest.raises(Refused, match="a holds NaN or infinity") as caught:
        Template(state, dtype).open(path)
    assert caught.value.cause == "non-finite"


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_boolean_that_is_neither_true_nor_false_is_refused(tmp_path, byte):
    for shape in ([], [3]):
        state = {"a": torch.zeros(shape, dtype=torch.bool)}
        data = bytearray(write(tmp_path / "file", state).read_bytes())
        data[-1] = 1
        (tmp_path / "file").write_bytes(data)
        assert Template(state, "float32").open(tmp_path / "file")["a"].sum() == 1
        data[-1] = byte
        assert refusal(tmp_path / "file", state, bytes(data)) == "format"


def test_a_weight_that_the_wire_dtype_cannot_hold_is_refused(tmp_path):
    state = {"a": torch.tensor([1e6])}
    with pytest.raises(Refused, match="a holds NaN or infinity"):
        Template(state, "float16").open(write(tmp_path / "file", state, "float16"))


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ({"a": torch.ones(4)}, "names"),
        ({"a": torch.ones(4), "b": torch.ones(2, 3), "c": torch.ones(1)}, "names"),
        ({"a": torch.ones(4), "B": torch.ones(2, 3)}, "names"),
        ({"a": torch.ones(4), "b": torch.ones(3, 2)}, "shape"),
        ({"a": torch.ones(4), "b": torch.ones(6)}, "shape"),
        ({"a": torch.ones(2), "b": torch.ones(2, 3)}, "shape"),
        ({"a": torch.ones(4, dtype=torch.int32), "b": torch.ones(2, 3)}, "dtype"),
        ({"a": torch.ones(4, dtype=torch.bool), "b": torch.ones(2, 3)}, "dtype"),
    ],
)
def test_a_snapshot_of_another_model_is_refused(tmp_path, other, cause):
    state = {"a": torch.ones(4), "b": torch.ones(2, 3)}
    assert refusal(write(tmp_path / "file", other), state) == cause


def test_a_snapshot_of_another_wire_dtype_is_refused(tmp_path):
    state = {"a": torch.ones(4)}
    assert refusal(write(tmp_path / "file", state, "bfloat16"), state) == "dtype"


def entry(begin: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ({"a": entry(0, 16), "b": entry(0, 16)}, "format"),  # overlap
        ({"a": entry(0, 16), "b": entry(8, 24)}, "format"),  # partly
        ({"a": entry(0, 16), "b": entry(20, 36)}, "format"),  # gap
        ({"a": entry(4, 20), "b": entry(20, 36)}, "format"),  # gap at the start
        ({"a": entry(0, 16), "b": entry(16, 48)}, "format"),  # longer than its shape
        ({"a": entry(0, 16), "b": entry(16, 16)}, "format"),
        ({"a": entry(0, 16), "b": entry(32, 16)}, "format"),
        ({"a": entry(0, 16), "b": entry(-16, 0)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 10**11, shape=[25 * 10**9 - 4])}, "shape"),
        ({"a": entry(0, 16), "b": entry(16, 10**11)}, "format"),
        ({"a": entry(0, 16), "b": entry(10**11, 10**11 + 16)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 2**63 - 1)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 2**64)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, shape=[2**62, 2**62])}, "shape"),
        ({"a": entry(0, 16), "b": entry(16, 32, shape=[-4])}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, shape=[4.0])}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, shape=[True])}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, shape=4)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, dtype="F128")}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, dtype=None)}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32, dtype=["F32"])}, "format"),
        ({"a": entry(0, 16), "b": {**entry(16, 32), "extra": 1}}, "format"),
        ({"a": entry(0, 16), "b": {"dtype": "F32", "shape": [4]}}, "format"),
        ({"a": entry(0, 16), "b": {**entry(16, 32), "data_offsets": [16]}}, "format"),
        ({"a": entry(0, 16), "b": {**entry(16, 32), "data_offsets": [16, 32, 48]}}, "format"),
        ({"a": entry(0, 16), "b": 7}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32), "__metadata__": []}, "format"),
        ({"a": entry(0, 16), "b": entry(16, 32), "__metadata__": {"x": 1}}, "format"),
        ([], "format"),
        (b'{"a":1,"a":2}', "format"),
        (b"", "format"),
        (b"\x80\x04cos\nsystem\n", "format"),
    ],
    ids=str,
)
def test_a_header_that_lies_is_refused(tmp_path, header, cause):
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    # As long as the header claims where that is possible, so that each lie has to be seen for itself.
    claims = header.values() if isinstance(header, dict) else ()
    ends = [claim["data_offsets"][-1] for claim in claims if isinstance(claim, dict) and len(claim) == 3]
    fitting = max(end for end in [0, *ends] if end < 1000)
    for payload in (bytes(fitting), bytes(32)):
        assert refusal(tmp_path / "file", state, pack(header, payload)) == cause


def test_metadata_is_allowed_and_ignored(tmp_path):
    state = {"a": torch.zeros(4)}
    (tmp_path / "file").write_bytes(pack({"a": entry(0, 16), "__metadata__": {"format": "pt"}}, bytes(16)))
    same(Template(state, "float32").open(tmp_path / "file"), state, "float32")


@pytest.mark.parametrize("length", [10**11, 2**63, 2**64 - 1, HEADER_BYTES + 1, 10**6])
def test_a_header_that_claims_to_be_huge_is_refused(tmp_path, length):
    state = {"a": torch.ones(4)}
    assert refusal(tmp_path / "file", state, pack({"a": entry(0, 16)}, bytes(16), length)) == "format"


@pytest.mark.parametrize("names", [1, 100])
def test_a_header_far_longer_than_our_own_is_refused_though_the_file_holds_it(tmp_path, names):
    state = {f"{i}": torch.ones(1000) for i in range(names)}
    own = len(write(tmp_path / "file", state).read_bytes()) - 4000 * names - 8
    entries = {name: entry(4000 * i, 4000 * i + 4000, shape=[1000]) for i, name in enumerate(state)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    for padding, good in ((own + METADATA_BYTES - 8, True), (own + METADATA_BYTES + 100, False)):
        padded = text.ljust(own + padding)
        (tmp_path / "file").write_bytes(pack(padded, bytes(4000 * names)))
        if good:
            assert Template(state, "float32").open(tmp_path / "file").keys() == state.keys()
        else:
            assert refusal(tmp_path / "file", state) in ("format", "size")


def test_a_header_with_far_more_values_than_our_own_is_refused_before_parsing(tmp_path, monkeypatch):
    state = {"a": torch.ones(4)}
    bomb = b'{"__metadata__":{},"a":[' + b"{}," * 5000 + b"{}]}"

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("it was parsed")

    monkeypatch.setattr(json, "loads", never)
    assert refusal(tmp_path / "file", state, pack(bomb, bytes(16))) == "size"


def test_no_model_makes_the_cap_on_headers_grow(tmp_path):
    state = {f"{'x' * 100_000}{i}": torch.ones(1) for i in range(120)}
    template = Template(state, "float32")
    assert template.limit == 8 + HEADER_BYTES + 4 * len(state)
    state = {**state, **{f"{'y' * 100_000}{i}": torch.ones(1) for i in range(60)}}
    for make in (Template, HostBuffer):
        with pytest.raises(ValueError, match=r"a snapshot cannot carry 180 tensors: a header of \d+ bytes is too long"):
            make(state, "float32")


def test_the_header_that_safetensors_writes_is_accepted_whatever_the_names_and_with_much_metadata(tmp_path):
    state = {
        **{f"layer.{i}.weight": torch.ones(2, 3) for i in range(300)},
        **{f"\N{LATIN SMALL LETTER U WITH DIAERESIS}, [{{{i}\n": torch.ones(1) for i in range(300)},
        **{str(i): torch.tensor(True) for i in range(300)},
    }
    save_file(state, tmp_path / "file", metadata={"format": "pt", "notes": "1, " * 1000, "long": "x" * 40_000})
    same(Template(state, "float32").open(tmp_path / "file"), state, "float32")


def test_a_file_of_100_gb_is_refused_without_mapping_it(tmp_path, monkeypatch):
    state = {"a": torch.ones(4)}
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(100 * 10**9)

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the file was mapped")

    monkeypatch.setattr(torch, "from_file", never)
    assert Template(state, "float32").limit < 100_000
    assert refusal(path, state) == "size"


def test_tensors_that_are_not_aligned_are_refused(tmp_path):
    state = {"a": torch.tensor(True), "b": torch.ones(4)}
    header = {"a": entry(0, 1, shape=[], dtype="BOOL"), "b": entry(1, 17)}
    assert refusal(tmp_path / "file", state, pack(header, bytes(17))) == "format"


def test_the_payload_starts_on_a_boundary_of_64_bytes(tmp_path):
    for name in ("a", "a" * 17, "a" * 50):
        data = write(tmp_path / "file", {name: torch.ones(3)}).read_bytes()
        assert (8 + int.from_bytes(data[:8], "little")) % 64 == 0


def test_the_hash_of_weights_sees_names_shapes_dtypes_and_values_but_not_layout():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1, dtype=torch.int64)}
    assert len(weights_hash(state)) == 64
    same_weights = [
        {name: state[name].clone() for name in reversed(state)},
        {**state, "a": state["a"].t().contiguous().t()},
        {**state, "tied": state["a"]},
    ]
    assert {weights_hash(other) for other in same_weights} == {weights_hash(state)}
    others = [
        {"a": state["a"]},
        {"A": state["a"], "b": state["b"]},
        {**state, "a": state["a"].view(3, 2)},
        {**state, "a": state["a"].view(torch.int32)},
        {**state, "a": state["a"] + 1e-6},
        {**state, "b": torch.tensor(2)},
        {**state, "a": state["a"].bfloat16()},
    ]
    assert len({weights_hash(other) for other in [state, *others]}) == 1 + len(others)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_copied_before_fill_returns_and_hashes_as_on_the_cpu(tmp_path):
    state = {"a": torch.randn(64, 3, 5, 5).to(memory_format=torch.channels_last), "b": torch.tensor(3)}
    on_gpu = {name: tensor.cuda() for name, tensor in state.items()}
    assert weights_hash(on_gpu) == weights_hash(state)
    for dtype in WIRE_DTYPES:
        live = {name: tensor.clone() for name, tensor in on_gpu.items()}
        buffer = HostBuffer(live, dtype)
        buffer.fill(live)
        for tensor in live.values():
            tensor.zero_()
        torch.cuda.synchronize()
        (tmp_path / "file").write_bytes(buffer.view())
        same(Template(live, dtype).open(tmp_path / "file"), state, dtype)
