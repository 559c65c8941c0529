"""What runs in a network namespace of its own does not run for ever."""

import pytest

from benchmarks import loopback


def test_what_takes_too_long_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "LONGEST_SECONDS", 1.0)
    with pytest.raises(RuntimeError) as found:
        loopback.alone("http.server", "0")
    if isinstance(found.value, loopback.Unavailable):
        pytest.skip(str(found.value))
    assert "http.server 0 took longer than 1 s" in str(found.value)
