"""Strict JSON: what two parsers could understand differently, or what is too much, is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codistill.exchange.errors import Refused
from codistill.exchange.strict_json import DEPTH, LIMIT, dumps, loads, most_values

SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def nested(levels: int) -> bytes:
    """An object holding lists, `levels` deep in all."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


@given(
    st.dictionaries(
        TEXTS, st.recursive(SCALARS | TEXTS, lambda inner: st.lists(inner, max_size=3), max_leaves=8), max_size=4
    )
)
def test_an_object_survives_the_round_trip_and_has_one_spelling(value):
    data = dumps(value)
    assert loads(data) == value
    assert dumps(dict(reversed(value.items()))) == data


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1,"a":1}',
        b'{"b":{"a":1,"a":2}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999}',
        b'{"a":9223372036854775808}',
        b'{"a":-9223372036854775809}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        nested(DEPTH + 1),
        nested(8_000),
        b"",
        b"[]",
        b"null",
        b'"{}"',
        b"{}{}",
        b'{"a":1',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":01}',
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_not_one_unambiguous_object_is_refused(data):
    with pytest.raises(Refused, match="not strict JSON") as caught:
        loads(data)
    assert caught.value.cause == "format"
    assert len(str(caught.value)) < 200


def test_the_bounds_themselves_are_accepted():
    assert loads(nested(DEPTH)).keys() == {"a"}
    assert loads(b'{"a":9223372036854775807,"b":-9223372036854775808}') == {"a": 2**63 - 1, "b": -(2**63)}
    assert loads(b"{}" + b" " * (LIMIT - 2)) == {}


def test_more_bytes_than_the_limit_are_refused_before_parsing():
    with pytest.raises(Refused) as caught:
        loads(b"{" * (LIMIT + 1))
    assert caught.value.cause == "size"
    with pytest.raises(Refused):
        loads(b'{"a":1}', limit=6)


def count(value):
    """The values in a parsed document, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count, inner))


@given(
    st.recursive(
        SCALARS | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    ),
    st.sampled_from([None, 1]),
)
def test_a_text_never_has_more_values_than_were_counted_beforehand(value, indent):
    assert count(value) <= most_values(json.dumps(value, indent=indent).encode())


def test_the_count_is_exact_where_no_text_holds_a_comma_or_a_bracket():
    value = {"a": [1, {"b": None}, "c"], "d": [0, 0]}
    assert count(value) == most_values(dumps(value))


@pytest.mark.parametrize("item", [b"0", b"{}", b"[]", b'{"a":0}', b'"a,b"'])
def test_more_values_than_a_document_has_are_refused_before_parsing(item, monkeypatch):
    def never(*_, **__):
        pytest.fail("it was parsed")

    monkeypatch.setattr(json, "loads", never)
    with pytest.raises(Refused, match=r"values in \d+ bytes of JSON, 8192 are allowed") as caught:
        loads(b'{"a":[' + b",".join([item] * (LIMIT // 8 - 1)) + b"]}")
    assert caught.value.cause == "size"


def test_as_many_values_as_are_allowed_are_parsed():
    data = b'{"a":[' + b",".join([b"0"] * (LIMIT // 8 - 2)) + b"]}"
    assert len(loads(data)["a"]) == LIMIT // 8 - 2
    assert loads(b'{"a":[0,0]}', values=4) == {"a": [0, 0]}
    with pytest.raises(Refused):
        loads(b'{"a":[0,0]}', values=3)


@given(st.binary(max_size=64))
def test_any_bytes_are_parsed_or_refused(data):
    try:
        value = loads(data)
    except Refused:
        return
    assert value == json.loads(data)


def test_numbers_that_json_cannot_say_are_not_written():
    with pytest.raises(ValueError, match="JSON compliant"):
        dumps({"a": float("nan")})
