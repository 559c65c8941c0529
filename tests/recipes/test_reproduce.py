"""The reproduction's table, rule and page; all but the last test train nothing."""

import importlib.util
import io
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.embedded.nmt.arms import Arm as NmtArm
from recipes.embedded.nmt.settings import Corpus
from recipes.embedded.nmt.settings import Training as NmtTraining
from recipes.embedded.processes import ProcessFailed
from recipes.embedded.progress import Progress
from recipes.embedded.reproduce import results, runner, search, settings
from recipes.embedded.reproduce.__main__ import main
from recipes.embedded.reproduce.claims import CLAIMS
from recipes.embedded.reproduce.figures import (
    BOX,
    FIGURES,
    GOYAL,
    GROWN,
    PEERS,
    PEERS_CONSTANT,
    PEERS_T,
    REDUCE,
    REDUCE_CONSTANT,
)
from recipes.embedded.reproduce.settings import SEEDS, Tuned
from recipes.embedded.reproduce.trainings import Place
from recipes.embedded.reproduce.verdicts import Part, Term, above, alike, decide, judge, not_worse, together
from recipes.embedded.steps import digest
from recipes.embedded.vision.arms import SCRIPT
from recipes.embedded.vision.arms import Arm as VisionArm
from recipes.embedded.vision.settings import Training as VisionTraining

PLACE, QUICK = Place(Path("data")), Place(Path("data"), quick=True)
CELLS = list(dict.fromkeys(cell for figure in FIGURES for cell in figure.cells()))
DOCS = Path(__file__).parents[2] / "docs"
BY_KEY = {figure.key: figure for figure in FIGURES}


def flags(argv) -> dict[str, str]:
    """The `--name value` pairs of a command line; the values of a flag are joined."""
    found: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            values = found.setdefault(word, [])
        elif found:
            values.append(word)
    return {name: " ".join(values) for name, values in found.items()}


# the table


def test_every_figure_of_the_paper_and_every_claim_is_there():
    assert [figure.key for figure in FIGURES][:17] == [str(number) for number in range(1, 18)]
    assert [claim.key for claim in CLAIMS][:10] == [f"C{number}" for number in range(1, 11)]
    assert all(claim.parts for claim in CLAIMS)
    shown = {key for claim in CLAIMS for key in claim.figures}
    assert set(BY_KEY) - shown == {"agreement"}  # which nothing is claimed of


def test_what_a_claim_compares_is_trained_for_its_figures_from_their_seeds():
    for claim in CLAIMS:
        trained = {cell for key in claim.figures for cell in BY_KEY[key].cells()}
        trained |= {GOYAL} if claim.key == "C2" else set()  # it says so
        assert {cell for part in claim.parts for term in part.terms for cell in term.cells} <= trained, claim.key
    for key in ("C1", "C2", "C3", "C6", "C7"):
        [claim] = [claim for claim in CLAIMS if claim.key == key]
        assert all(set(BY_KEY[figure].seeds) >= set(SEEDS) for figure in claim.figures)


def test_every_figure_shows_a_part_of_each_claim_it_is_for():
    for claim in CLAIMS:
        for key in claim.figures:
            assert any(part.compared <= BY_KEY[key].shown() for part in claim.parts), (claim.key, key)
    [c8] = [claim for claim in CLAIMS if claim.key == "C8"]
    shown = {key: [part.says for part in c8.parts if part.compared <= BY_KEY[key].shown()] for key in c8.figures}
    assert [len(parts) for parts in shown.values()] == [4, 4, 2]
    assert all(says.startswith("Transformer") for says in shown["16"])


def test_a_figure_alone_is_trained_in_the_folders_of_all_figures():
    shared = {(run.cell, run.seed): run.arm.folder for run in runner.runs_of(FIGURES, PLACE)}
    for figure in FIGURES:
        for run in runner.runs_of([figure], PLACE):
            assert run.arm.folder == shared[run.cell, run.seed], run.cell.slug


@pytest.mark.parametrize("place", [PLACE, QUICK], ids=["full", "quick"])
def test_all_ways_of_a_figure_have_the_same_workers_and_updates_per_worker(place):
    for figure in FIGURES[:17]:
        arms = [(cell, place.arm(cell, 0)) for cell in figure.cells()]
        assert {arm.members * arm.workers for _, arm in arms} == {2}
        updates = {(cell.task == "nmt", cell.batch): arm.training.updates for cell, arm in arms}
        assert all(arm.training.updates == updates[cell.task == "nmt", cell.batch] for cell, arm in arms)
        for cell, arm in arms:
            if cell.task != "nmt":
                assert arm.epochs * arm.updates_per_epoch == arm.training.updates
                assert arm.updates_per_epoch * arm.workers * arm.training.batch == settings.IMAGES // cell.part


def test_the_ticks_of_a_sweep_are_what_is_varied():
    assert BY_KEY["6"].panels[0].ticks == {-3: "0.125", -2: "0.25", -1: "0.5", 0: "1"}
    assert BY_KEY["peers"].panels[0].ticks == {2: "2", 3: "3", 4: "4"}


def test_the_schedules_are_those_of_the_paper():
    def shown(cell):
        given = flags(PLACE.arm(cell, 0).train_commands()[0].argv)
        return [given.get(name) for name in ("--epochs", "--decay-milestones", "--codistill-weight-decay")]

    decay = [f"{settings.CHOSEN['resnet', 'codistill'].regularisation * factor:g}" for factor in (1, 0.1)]
    assert shown(GOYAL) == ["90", "30 60 80", None]
    assert shown(BOX) == ["45", "15 30 40", None]
    assert shown(REDUCE_CONSTANT) == ["90", "36 76 88", None]
    assert shown(PEERS) == ["45", "18 38 44", f"0:{decay[0]},18:{decay[1]},38:0"]
    assert shown(replace(PEERS, schedule="cosine"))[1] is None


def test_out_of_the_box_has_the_baselines_settings_at_half_the_learning_rate():
    tuned = settings.CHOSEN["resnet", "constant"]
    arms = [PLACE.arm(cell, 0) for cell in (GOYAL, BOX)]
    assert [arm.lr for arm in arms] == [tuned.lr, tuned.lr / 2]
    assert {arm.training.weight_decay for arm in arms} == {tuned.regularisation}


def test_a_constant_weight_decay_is_all_that_figure_12_changes_of_figure_2():
    for cell, constant in ((REDUCE, REDUCE_CONSTANT), (PEERS, PEERS_CONSTANT)):
        arm, other = PLACE.arm(cell, 0), PLACE.arm(constant, 0)
        assert replace(other, training=replace(other.training, decay=arm.training.decay)) == arm
        assert arm.training.decay
        assert not other.training.decay


def test_both_workers_of_the_baseline_take_the_images_in_an_order_of_the_seeds_own():
    for seed in (0, 3):
        assert flags(PLACE.arm(REDUCE, seed).train_commands()[0].argv)["--sampler-seed"] == str(seed)
    demo = VisionArm("all_reduce", 3, VisionTraining(), Path("digits"), Path("arms"))
    assert "--sampler-seed" not in demo.train_commands()[0].argv


def test_an_eighth_of_the_images_is_seen_eight_times_as_often():
    whole, eighth = (flags(PLACE.arm(replace(REDUCE, part=part), 3).train_commands()[0].argv) for part in (1, 8))
    assert int(eighth["--epochs"]) == 8 * int(whole["--epochs"])
    assert (whole["--codistill-data-fraction"], eighth["--codistill-data-fraction"]) == ("1.0", "0.125")


def test_every_different_training_has_a_name_and_a_folder_of_its_own():
    grids = [cell for base in search.BASES for cell in search.grid(base).values()]
    for cells in (CELLS, grids):
        assert len({cell.slug for cell in cells}) == len({PLACE.arm(cell, 0).folder for cell in cells}) == len(cells)
    assert len(runner.runs_of(FIGURES, PLACE)) == len({run.arm.folder for run in runner.runs_of(FIGURES, PLACE)})


def test_what_is_chosen_is_on_the_searched_grid():
    assert all(tuned in settings.GRIDS[task] for (task, _), tuned in settings.CHOSEN.items())
    assert set(settings.SEARCH_SEEDS).isdisjoint(SEEDS)


def test_what_lies_at_the_edge_of_the_grid_is_named():
    assert search.at_the_edge("resnet", Tuned(0.1, 1e-4)) == ""  # of two values, each is at the edge
    assert search.at_the_edge("resnet", Tuned(1.0, 1e-4)) == "the greatest learning rate tried"
    assert search.at_the_edge("nmt", Tuned(3e-3, 0.05)) == "the least regularisation tried"


def test_the_demos_finished_trainings_are_still_recognised():
    vision = VisionArm("codistill", 0, VisionTraining(), Path("digits"), Path("arms"))
    nmt = NmtArm("codistill", Corpus(), replace(NmtTraining(), seed=11), Path("corpus"), Path("arms"))
    assert digest(vision.settings) == "59fed15261e180d3"
    assert digest(nmt.settings) == "2ee6fe8d2f59c73b"


def test_the_script_understands_every_flag_of_the_images():
    from timm_codistill.options import add_arguments, codistill_config, data_config

    spec = importlib.util.spec_from_file_location("stand_in_for_the_reproduction", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    add_arguments(module.parser)
    for place in (PLACE, QUICK):
        for cell in CELLS:
            if cell.task != "nmt":
                arm = place.arm(cell, 0)
                argv = arm.train_commands()[0].argv
                args = module.parser.parse_args(argv[argv.index(str(SCRIPT)) + 1 :])
                assert codistill_config(args).peers == arm.members
                assert data_config(args).data_fraction * settings.IMAGES == arm.training.images


def test_fairseq_understands_every_flag_of_the_translations():
    from fairseq import options

    for place in (PLACE, QUICK):
        for cell in CELLS:
            if cell.task == "nmt":
                arm = place.arm(cell, 0)
                argv = arm.train_commands()[0].argv
                parser = options.get_training_parser()
                args = options.parse_args_and_arch(parser, input_args=list(argv[argv.index("fairseq_cli.train") + 1 :]))
                assert args.codistill_peers == arm.members
                assert args.max_update == arm.training.updates


# the rule

PART = Part("", (Term(1.0, "top1", (PEERS,)), Term(-1.0, "top1", (REDUCE,))), "above")


@pytest.mark.parametrize(
    ("rule", "bound", "sums", "verdict"),
    [
        ("above", 0.0, [1.0, 1.2, 0.9], "holds"),
        ("above", 0.0, [-1.0, -1.2, -0.9], "does not hold here"),
        ("above", 0.0, [1.0, -1.2, 0.9], "undecided"),
        ("above", 0.0, [1.0], "undecided"),
        ("above", 0.0, [1.0, 1.2, math.nan], "undecided"),
        ("below", 0.0, [-1.0, -1.2, -0.9], "holds"),
        ("above", -0.5, [-0.1, 0.0, -0.2], "holds"),
        ("below", 0.5, [0.9, 1.0, 1.1], "does not hold here"),
        ("within", 0.5, [0.1, -0.1, 0.0], "holds"),
        ("within", 0.5, [0.9, 1.0, 1.1], "does not hold here"),
        ("within", 0.5, [-0.9, -1.0, -1.1], "does not hold here"),
        ("within", 0.5, [0.4, 0.6, 0.1], "undecided"),
        ("within", 0.5, [0.0, 0.0, 0.0], "holds"),
    ],
)
def test_a_part_is_judged_by_where_its_whole_interval_lies(rule, bound, sums, verdict):
    judged = decide(replace(PART, rule=rule, bound=bound), sums)
    assert judged.verdict == verdict
    if len(sums) > 1 and math.isfinite(sum(sums)):
        assert (judged.p < 0.025) == (verdict == "holds")


def test_the_interval_is_students():
    judged = decide(PART, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert judged.mean == 3.0
    assert judged.high - judged.mean == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert judged.p == pytest.approx(0.00662, rel=1e-2)


def test_sums_of_which_two_share_a_seed_have_a_wider_interval():
    part = Part("", (Term(1.0, "churn", (PEERS,)),), "above")
    judged, independent = (decide(one, [1.0, 2.0, 3.0, 4.0, 5.0]) for one in (part, PART))
    width, narrower = judged.high - judged.mean, independent.high - independent.mean
    assert width / narrower == pytest.approx(math.sqrt(2 / 0.75))  # twice the variance, of which a quarter is not seen
    assert judged.p > independent.p
    assert decide(part, [1.0, 1.0]).verdict == "undecided"  # of two seeds both differences are the same


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_all_have():
    measured = {(PEERS.slug, "top1"): {0: 91.0, 1: 81.0, 2: 71.0}, (REDUCE.slug, "top1"): {1: 80.0, 2: 70.5, 3: 1.0}}
    judged = judge(PART, measured)
    assert (judged.seeds, judged.mean) == (2, 0.75)
    assert judge(PART, {}).verdict == "not run"


def test_the_best_of_several_is_the_best_on_average():
    others = tuple(replace(PEERS_T, alpha=alpha) for alpha in (0.5, 2.0))
    part = Part("", (Term(1.0, "valid_nll", others), Term(-1.0, "valid_nll", (PEERS_T,))), "below")
    measured = {
        (others[0].slug, "valid_nll"): {0: 1.0, 1: 5.0},
        (others[1].slug, "valid_nll"): {0: 2.0, 1: 2.0},
        (PEERS_T.slug, "valid_nll"): {0: 3.0, 1: 3.0},
    }
    assert judge(part, measured).mean == -1.0
    assert judge(part, measured).best == ((others[1], others),)
    assert judge(part, {key: value for key, value in measured.items() if key[0] != others[0].slug}).verdict == "not run"


def test_a_training_loss_is_compared_as_a_share():
    part = alike("", "train_loss", PEERS, REDUCE)
    measured = {(PEERS.slug, "train_loss"): {0: 0.105, 1: 0.21}, (REDUCE.slug, "train_loss"): {0: 0.1, 1: 0.2}}
    judged = judge(part, measured)
    assert math.expm1(judged.mean) == pytest.approx(0.05)
    assert math.expm1(part.bound) == pytest.approx(settings.MARGINS["train_loss"])
    assert judged.verdict == "holds"
    measured[PEERS.slug, "train_loss"] = {0: 0.0, 1: 0.21}
    assert judge(part, measured).verdict == "undecided"


def test_worse_means_lower_accuracy_and_higher_loss():
    assert (not_worse("", "top1", PEERS, REDUCE).rule, not_worse("", "top1", PEERS, REDUCE).bound) == ("above", -0.5)
    assert not_worse("", "valid_nll", PEERS, REDUCE).rule == "below"
    assert alike("", "train_loss", PEERS, REDUCE).rule == "within"
    assert above("", "distance", PEERS, REDUCE).bound == 0


def test_a_claim_holds_when_all_its_parts_do():
    assert together(["holds", "holds"]) == "holds"
    assert together(["holds", "undecided"]) == "undecided"
    assert together(["undecided", "does not hold here", "not run"]) == "does not hold here"
    assert together(["holds", "not run"]) == "undecided"
    assert together(["not run", "not run"]) == "not run"


# the page


def write_runs(folder: Path, ends: dict, seeds=(0, 1, 2)) -> None:
    """`ends`: cell -> metric -> values by seed."""
    rows = [
        {"cell": cell.slug, "seed": seed, "model": 0, "workers": 2, "updates": 9, "seconds": 60}
        | {metric: values[number] for metric, values in metrics.items()}
        for cell, metrics in ends.items()
        for number, seed in enumerate(seeds)
    ]
    results._write(folder / "runs.csv", results.COLUMNS, rows)
    points = [
        {name: row[name] for name in ("cell", "seed", "model")} | {"metric": "top1", "update": at, "value": row["top1"]}
        for row in rows
        if "top1" in row
        for at in (3, 9)
    ]
    results._write(folder / "curves.csv", results.POINT, points)


def test_the_page_follows_from_the_numbers_alone(tmp_path):
    folder = tmp_path / "reproduction"
    folder.mkdir()
    ends = {REDUCE_CONSTANT: [97.0, 96.0, 98.0], PEERS_CONSTANT: [95.9, 95.0, 97.1], PEERS: [98.0, 97.0, 99.2]}
    write_runs(folder, {cell: {"top1": values} for cell, values in ends.items()})
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "reproduction.md").read_text(encoding="utf-8").splitlines()
    [claim] = [line for line in lines if line.startswith("| [C3](#c3) ")]
    decides = "accuracy is lower than that of all_reduce: -1.00 (-1.25 to -0.75), p 0.002"
    assert claim.endswith(f"| [12](#figure-12) | **holds** | {decides} |")
    [part] = [line for line in lines if line.startswith("| accuracy is lower than that of all_reduce |")]
    assert part.endswith("| below 0 | -1.00 | -1.25 to -0.75 | 0.002 | 3 | holds |")
    assert "| all_reduce | validation top-1 (%) | 97.0 ± 2.5 | 0 1 2 (not run: 3 4 5 6 7 8 9) |" in lines
    assert any(line.startswith("| [C10](#c10) ") and line.endswith("**not run** |  |") for line in lines)
    assert any(
        line.startswith("**9 of ") and line.endswith("`make reproduce` goes on with the rest.") for line in lines
    )
    assert not any("[[" in line for line in lines)
    pictures = [line.partition("](")[2].rstrip(")") for line in lines if line.startswith("![")]
    assert {"reproduction/figure-2.png", "reproduction/figure-12.png"} <= set(pictures)
    assert (tmp_path / pictures[0]).read_bytes().startswith(b"\x89PNG")


def test_the_page_in_docs_is_what_its_numbers_say(tmp_path):
    shutil.copytree(DOCS / "reproduction", tmp_path / "reproduction", ignore=shutil.ignore_patterns("*.png"))
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    written = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert written == (DOCS / "reproduction.md").read_text(encoding="utf-8")
    drawn = {path.name for path in (tmp_path / "reproduction").glob("*.png")}
    assert drawn == {path.name for path in (DOCS / "reproduction").glob("*.png")}


def test_what_was_found_is_not_said_of_other_results(tmp_path):
    folder = tmp_path / "reproduction"
    folder.mkdir()
    write_runs(folder, {REDUCE: {"top1": [97.0, 96.0, 98.0]}})
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert "## What came of it" not in page
    assert "Searched (means over two seeds of their own):" in page  # the settings are the same


def test_numbers_that_are_older_than_a_metric_can_still_be_read(tmp_path):
    write_runs(tmp_path, {REDUCE: {"top1": [97.0, 96.0, 98.0]}})
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    (tmp_path / "runs.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
    assert results.read(tmp_path).ends[REDUCE.slug, "top1"] == {0: 97.0, 1: 96.0, 2: 98.0}


def test_every_figure_of_the_paper_leads_to_a_recipe_at_its_own_scale_and_to_a_verdict(tmp_path):
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    sections = (tmp_path / "reproduction.md").read_text(encoding="utf-8").split("### Figure ")[1:]
    assert [section.partition("\n")[0] for section in sections] == [str(number) for number in range(1, 18)]
    for section in sections:
        assert re.search(r"^C\d+.*: \*\*.+\*\*", section, flags=re.M), section
        [recipe] = re.findall(r"At the paper's scale: `(.+?)`\.", section)
        assert (Path(__file__).parents[2] / recipe).exists()


def test_a_diverged_training_is_told_and_keeps_no_page_from_being_written(tmp_path):
    folder = tmp_path / "reproduction"
    folder.mkdir()
    ends = {REDUCE_CONSTANT: [97.0, math.nan, 98.0], PEERS_CONSTANT: [95.9, 95.0, 97.1], PEERS: [98.0, 97.0, 99.2]}
    write_runs(folder, {cell: {"top1": values} for cell, values in ends.items()})
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "reproduction.md").read_text(encoding="utf-8").splitlines()
    told = "| all_reduce | validation top-1 (%) | diverged: 1 of 3 | 0 1 2 (not run: 3 4 5 6 7 8 9) |"
    assert told in lines
    assert "C3: **undecided**." in lines


def test_a_figure_shows_its_own_seeds_alone_and_the_best_of_a_sweep_is_named(tmp_path):
    folder = tmp_path / "reproduction"
    folder.mkdir()
    nlls = dict(zip(GROWN[1.0], (5.0, 4.9, 4.7, 4.8), strict=True)) | dict(
        zip(GROWN[1.1], (4.6, 4.7, 4.7, 4.7), strict=True)
    )
    write_runs(
        folder, {cell: {"valid_nll": [nll, nll + 0.1, nll + 0.2]} for cell, nll in nlls.items()}, seeds=(1, 2, 7)
    )
    assert main(["--page-only", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "reproduction.md").read_text(encoding="utf-8")
    assert "best: γ = 1.1, alpha 0.125, the least tried; best: alpha 1 |" in page
    assert "| γ = 1, alpha 1 | validation NLL (bits per subword) | 4.750 ± 0.635 | 1 2 (not run: 0) |" in page


# a training


def test_a_training_whose_peers_went_missing_does_not_count(tmp_path):
    cell = replace(PEERS, peers=3)
    run = runner.Run(cell, 0, "test", Place(tmp_path).arm(cell, 0))

    def log(member: int, interval: int, peers: list[int], incidents: int = 0) -> None:
        run.arm.save_dir(member).mkdir(parents=True, exist_ok=True)
        same = {"incidents": incidents, "distance": 1.0, "agreement": 1.0}
        rows = [{"update": interval * at, "peers": n, **same} for at, n in enumerate(peers, 1)]
        (run.arm.save_dir(member) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def summary(member: int, train_loss: str) -> None:
        text = f"epoch,train_loss,eval_loss,eval_top1\n0,{train_loss},1.0,50.0\n"
        (run.arm.save_dir(member) / "summary.csv").write_text(text)

    for member in range(3):
        log(member, 8, [0, 2, 2, 2, 2])
        summary(member, "1.0")
    run.check()
    log(1, 8, [0, 2, 1, 1, 2])
    with pytest.raises(ProcessFailed, match="model 1 had all its peers in 50% of its intervals"):
        run.check()
    replace(run, cell=replace(cell, alpha=0.0)).check()
    log(1, 8, [0, 2, 2, 2, 2], incidents=3)
    with pytest.raises(ProcessFailed, match="model 1 met 3 incidents"):
        run.check()
    summary(2, "nan")
    run.check()  # it has diverged, which is a result
    summary(2, "1.0")
    log(1, 8, [0])
    run.check()  # too short to say


def test_a_training_that_fails_is_told_and_the_others_go_on(tmp_path):
    place = Place(tmp_path, quick=True)
    arm = replace(place.arm(REDUCE, 0), data=tmp_path / "nowhere")
    runs = [runner.Run(REDUCE, seed, "test", replace(arm, seed=seed)) for seed in (0, 1)]
    said = io.StringIO()
    assert runner.train(runs, place, Progress(said)) == runs
    assert said.getvalue().count("ended with status 1") == 2
    assert [run.seconds for run in runs] == [None, None]


def test_a_model_that_comes_with_more_peers_takes_longer():
    runs = [runner.Run(replace(PEERS, peers=peers), 0, "test", PLACE.arm(PEERS, 0)) for peers in (2, 4)]
    assert runner.seconds_left(runs[1:]) == 2 * runner.seconds_left(runs[:1])


def test_a_finished_training_is_judged_and_not_trained_again(tmp_path):
    place = Place(tmp_path, quick=True)
    cell = replace(PEERS, part=8)
    arm = place.arm(cell, 0)
    run = runner.Run(cell, 0, "test", replace(arm, training=replace(arm.training, updates=8, interval=4)))
    progress = Progress(io.StringIO())
    runner.prepare(place, ["resnet"], progress)
    runner.train([run], place, progress)
    mark = run.arm.folder / "done.json"
    trained = mark.stat().st_mtime_ns
    assert run.update == 8
    assert not (run.arm.folder / "exchange").exists()

    runner.evaluate([run], place, progress)
    results.write(tmp_path, [(cell, 0, run.arm)], {(cell, "agreement")})
    found = results.read(tmp_path)
    evaluation = json.loads((run.arm.folder / results.EVALUATION).read_text())
    logged = found.ends[cell.slug, "top1"][0]
    assert sum(model["top1"] for model in evaluation["models"]) / 2 == pytest.approx(logged, abs=1e-3)
    assert {(cell.slug, f"{kind}_top1") for kind in ("ensemble", "averaged", "again")} <= set(found.ends)
    assert [update for update, _ in found.curves[cell.slug, "agreement"][0]] == [4, 6, 8]

    runner.train([run], place, progress)
    assert mark.stat().st_mtime_ns == trained
    assert runner.seconds_left([run]) == 0

    summary = run.arm.save_dir(1) / "summary.csv"
    *before, last = summary.read_text().splitlines()
    names = before[0].split(",")
    row = dict(zip(names, last.split(","), strict=True)) | {"train_loss": "nan"}
    summary.write_text("\n".join([*before, ",".join(row.values())]) + "\n")
    results.write(tmp_path, [(cell, 0, run.arm)], ())
    assert math.isnan(results.read(tmp_path).ends[cell.slug, "top1"][0])  # its logits are NaN: top-1 says nothing
