"""The comparison of ways to codistil, on hand-made numbers: nothing is trained."""

from pathlib import Path

import pytest

from codistill import CodistillConfig
from recipes.embedded import exchanges, measures
from recipes.embedded.exchanges import Outcome
from recipes.embedded.nmt.arms import Arm as NmtArm
from recipes.embedded.nmt.settings import DEEPER, Corpus
from recipes.embedded.nmt.settings import Training as NmtTraining
from recipes.embedded.variants import CHECKPOINT, VARIANTS
from recipes.embedded.vision.arms import Arm as VisionArm
from recipes.embedded.vision.settings import Training as VisionTraining


def arms(variant):
    place = Path("arms")
    return (
        NmtArm("codistill", Corpus(), NmtTraining(), Path("corpus"), place, variant),
        VisionArm("codistill", 0, VisionTraining(), Path("digits"), place, variant),
    )


def values(argv, flag):
    return [argv[i + 1] for i, word in enumerate(argv) if word == flag]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_a_valid_run_of_as_many_peers_as_it_says(variant):
    for arm in arms(variant):
        commands = [list(command.argv) for command in arm.train_commands()]
        assert [values(argv, "--codistill-peer") for argv in commands] == [[str(i)] for i in range(variant.peers)]
        assert all(values(argv, "--codistill-peers") == [str(variant.peers)] for argv in commands)
        assert all(set(variant.flags) <= set(argv) for argv in commands)
    pairs = zip(variant.flags[::2], variant.flags[1::2], strict=True)
    named = {flag.removeprefix("--codistill-"): int(text) if text.isdecimal() else text for flag, text in pairs}
    CodistillConfig(dir="exchange", peers=variant.peers, **named)


def test_every_second_of_unlike_peers_is_deeper():
    unlike = next(variant for variant in VARIANTS if variant.unlike)
    nmt, vision = ([list(command.argv) for command in arm.train_commands()] for arm in arms(unlike))
    assert [values(argv, "--encoder-layers") for argv in nmt] == [[str(NmtTraining().layers)], [str(DEEPER)]]
    first, second = (values(argv, "--model") for argv in vision)
    assert first == [VisionTraining().model]
    assert second != first


def test_the_demos_own_trainings_are_reused_and_no_two_variants_share_a_folder():
    for number in range(2):
        folders = [arms(variant)[number].folder for variant in VARIANTS]
        assert len(set(folders)) == len(VARIANTS)
        assert "variant" not in arms(CHECKPOINT)[number].settings


def test_the_report_compares_with_checkpoints_seed_by_seed():
    outcomes = [
        Outcome(variant.name, seed, peer, 0.0, 90.0 + seed + (variant.name == "prediction"), 0.7, 0.5, 1000, 61.0)
        for variant in VARIANTS
        for seed in exchanges.SEEDS["vision"]
        for peer in range(variant.peers)
    ]
    lines = exchanges._report("vision", outcomes).splitlines()
    [prediction] = [line for line in lines if line.startswith("prediction, peer 1")]
    assert prediction.split()[3:] == "0.0 ± 0.0 93.0 ± 1.6 1.0 ± 0.0 70 % 0.50 1:01 1,000".split()
    assert sum(line.startswith("ring-of-4") for line in lines) == 4
    assert any(line.startswith("unlike, peer 1, deeper") for line in lines)


def test_agreement_is_the_last_one_measured_with_a_peer_in_use():
    rows = [{"agreement": 0.2, "peers": 1}, {"agreement": 0.4, "peers": 1}, {"agreement": 0.0, "peers": 0}]
    assert measures.agreement(rows) == 0.4
    assert measures.agreement([]) != measures.agreement([])
