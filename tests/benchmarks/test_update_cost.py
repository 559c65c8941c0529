"""What takes turns is what the rows say: plain, codistilled with so many peers, timm's own, a bare forward pass."""

import pytest

from benchmarks.update_cost import CASES, CODISTILLED, DISTILLED, FORWARD, PLAIN, Case, actions, rows
from benchmarks.workloads import Translation, Vision
from codistill.losses import distill

TINY = Vision("test_resnet", images=4, pixels=32, classes=5)
WORDS = Translation(classes=50, width=16, layers=1, sentences=2, words=5)


@pytest.mark.parametrize(
    ("case", "contenders"),
    [
        (Case(TINY), {PLAIN, CODISTILLED, DISTILLED, FORWARD}),
        (Case(TINY, peers=2, bfloat16=True), {PLAIN, CODISTILLED, FORWARD}),
        (Case(WORDS, peers=2), {PLAIN, CODISTILLED, FORWARD}),
    ],
)
def test_every_contender_runs_and_the_peers_take_part(case, contenders, monkeypatch):
    seen = []

    def counting(own, peers, **how):
        seen.append(len(peers))
        return distill(own, peers, **how)

    monkeypatch.setattr("codistill.codistiller.distill", counting)
    with actions(case, "cpu") as taking_turns:
        assert set(taking_turns) == contenders
        seen.clear()  # an exchange may end with a batch
        for name, action in taking_turns.items():
            action()
            assert seen == ([case.peers] if name == CODISTILLED else [])
            seen.clear()


def test_each_row_has_a_name_of_its_own():
    seconds = {name: [1.0, 2.0, 3.0] for name in (PLAIN, CODISTILLED, DISTILLED, FORWARD)}
    names = [row.name for case in CASES for row in rows(case, seconds)]
    assert len(names) == len(set(names)) == 2 * len(CASES)
