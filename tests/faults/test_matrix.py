"""Every point of the matrix with real peers; `make faults` runs every fault at each of them."""

import pytest

from tests.faults.matrix import Places, rows, run
from tests.faults.tiny_peer import Starter
from tests.fixtures_store import s3_server  # noqa: F401


def representative():
    """At every point a failure, a death and one kind of damage, on alternating stores; every fault of a meeting."""
    chosen, damage = [], ("flip", "truncate", "stale", "lose")
    for number, point in enumerate(dict.fromkeys(row.point for row in rows())):
        of_point = [row for row in rows() if row.point == point]
        alone = [row for row in of_point if row.workers == 1]
        first, second = ("folder", "s3")[:: 1 if number % 2 else -1]
        chosen += [row for row in alone if (row.kind, row.store) in (("fail", first), ("kill", second))]
        spoilt = [row for row in alone if row.kind in damage and row.store == first]
        chosen += spoilt[number % len(spoilt) :][:1] if spoilt else []
        several = [row for row in of_point if row.workers > 1 and row.store == first]
        chosen += several if point == "meeting" else [row for row in several if row.kind == "fail"][-1:]
    return chosen


@pytest.fixture(scope="module")
def starter():
    with Starter() as started:
        yield started


@pytest.mark.parametrize("row", representative(), ids=str)
def test_training_goes_on_whatever_the_fault(row, s3_server, starter, tmp_path):  # noqa: F811
    outcome = run(row, Places(s3_server), starter, tmp_path)
    assert outcome.good, f"{outcome.text}; counted {outcome.causes}\n{outcome.trouble}"
