"""What is hooked into the task: the update counter, checkpoints, weight decay, the end of training."""

import json
import logging
import resource

import pytest
import torch
from fairseq import optim
from fairseq.distributed import DistributedTimeoutWrapper
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.tasks.translation import TranslationTask

from codistill import KEYS
from codistill.exchange.objects import Objects
from codistill.exchange.store import RunStore
from fairseq_codistill.hooks import fingerprint
from tests.fairseq_codistill.toy_host import END, batch, data, dictionary, hosts, quick_exchange  # noqa: F401
from tests.fixtures_peers import until

ALONE = ("--codistill-peers", "1")
SCHEDULE = ("--weight-decay", "0.1", "--codistill-weight-decay", "0:0.1,5u:0,10u:0.3")
OUT_OF_TIME = "Stopping training due to cumulative_training_time: 1.1 > stop_time_hours: 1.0 hour(s)"


def say(message):
    logging.getLogger("fairseq_cli.train").info(message)


@pytest.fixture(autouse=True)
def talkative_log(caplog):
    caplog.set_level(logging.INFO, "fairseq_cli.train")


def latest(tmp_path, peer):
    return RunStore(Objects(str(tmp_path / "store")), "default").latest(peer)


def lines(host):
    path = host.cfg.checkpoint.save_dir + "/metrics.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def two_groups(host):
    """An optimiser with a group that decays and one that does not."""
    weights = [p for p in host.model.parameters() if p.dim() > 1]
    others = [p for p in host.model.parameters() if p.dim() == 1]
    host.optimizer = optim.build_optimizer(host.cfg.optimizer, weights)
    host.optimizer.optimizer.add_param_group({"params": others, "weight_decay": 0.0})
    return host


def decays(host):
    return [group["weight_decay"] for group in host.optimizer.param_groups]


def test_the_hosts_own_step_gets_the_same_arguments_and_its_result_goes_through(hosts, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(TranslationTask, "train_step", lambda task, **given: seen.append(given) or "result")
    host = hosts(0, *ALONE)
    given = {"sample": 1, "model": host.model, "criterion": host.criterion, "optimizer": host.optimizer}
    assert host.task.train_step(**given, update_num=3, ema_model="ema") == "result"
    assert seen == [{**given, "update_num": 3, "ignore_grad": False, "ema_model": "ema"}]


def test_several_batches_of_one_update_count_once(hosts):  # noqa: F811
    host = hosts(0, *ALONE, "--codistill-interval", "2")
    for update in (0, 0, 1, 1, 2, 2, 2, 3, 4):
        host.step(batch(host), update)
    assert [line["update"] for line in lines(host)] == [2, 4]


def test_nothing_is_written_before_the_first_update(hosts, tmp_path):  # noqa: F811
    hosts(0)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "peer-0").exists()


def test_metrics_reach_fairseqs_log_under_the_same_keys_with_and_without_peers(hosts):  # noqa: F811
    host = hosts(0, *ALONE)
    with metrics.aggregate(new_root=True) as found:
        host.step(batch(host), 0)
    assert {f"codistill_{key}" for key in KEYS} - {"codistill_loss", "codistill_agreement"} <= found.keys()


def test_a_model_that_fairseq_watches_for_its_heartbeat_is_told_how_far_it_has_moved(hosts):  # noqa: F811
    host = hosts(0, *ALONE)
    host.model = DistributedTimeoutWrapper(host.model, timeout=0)
    host.step(batch(host), 0)
    with torch.no_grad():
        for parameter in host.model.parameters():
            parameter.add_(1.0)
    host.step(batch(host), 1)
    assert host.codistiller.metrics()["distance"] > 0


def test_building_a_peers_module_leaves_task_and_generators_alone(hosts):  # noqa: F811
    other, host = hosts(1), hosts(0)
    other.leave()
    before = dict(vars(host.task))
    host.step(batch(host), 0)
    torch.manual_seed(5)
    host.take_up()
    assert vars(host.task).keys() == before.keys()
    drawn = torch.rand(3)
    assert drawn.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_our_state_lies_beside_the_tasks_own_and_comes_back(hosts, tmp_path):  # noqa: F811
    other, host = hosts(1), hosts(0)
    other.leave()
    at = host.take_up()
    state = host.task.get_checkpoint_dict()
    ours = state["TranslationTask"]["codistill"]
    assert ours == host.codistiller.state_dict()
    assert list(ours["in_use"]) == ["1"]
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state  # plain types only
    host.codistiller.close()

    resumed = hosts(0)
    resumed.task.set_checkpoint_dict(state["TranslationTask"])
    resumed.step(batch(resumed), at)
    assert resumed.codistiller.active
    assert resumed.codistiller.state_dict()["in_use"] == ours["in_use"]
    assert resumed.codistiller.state_dict()["init_hash"] == ours["init_hash"]


def test_a_copy_of_a_checkpoint_that_fails_half_way_leaves_the_one_before(hosts, tmp_path):  # noqa: F811
    hosts(0, *ALONE)
    new, last = tmp_path / "checkpoint_1_2.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(bytes(200_000))
    last.write_bytes(b"whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            PathManager.copy(str(new), str(last), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert last.read_bytes() == b"whole"
    assert PathManager.copy(str(new), str(last), overwrite=True)
    assert last.read_bytes() == new.read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_tasks_own_checkpoint_state_stays_its_own(hosts, monkeypatch):  # noqa: F811
    given = []
    own = {"Other": {"kept": 1}, "TranslationTask": {"also": 2}}
    monkeypatch.setattr(TranslationTask, "get_checkpoint_dict", lambda task: own, raising=False)
    monkeypatch.setattr(TranslationTask, "set_checkpoint_dict", lambda task, state: given.append(state), raising=False)
    host = hosts(0, *ALONE)
    assert host.task.get_checkpoint_dict() == {"Other": {"kept": 1}, "TranslationTask": {"also": 2}}
    host.step(batch(host), 0)
    state = host.task.get_checkpoint_dict()
    assert state["Other"] == {"kept": 1}
    assert state["TranslationTask"].keys() == {"also", "codistill"}
    host.task.set_checkpoint_dict(state["TranslationTask"])
    assert given == [{"also": 2}]


def test_a_checkpoint_without_our_state_starts_anew(hosts):  # noqa: F811
    host = hosts(0, *ALONE)
    host.task.set_checkpoint_dict({})
    host.step(batch(host), 7)
    assert host.codistiller.state_dict()["update"] == 7


def test_the_floor_of_a_restart_rises_only_when_training_goes_on_after_a_checkpoint(hosts, tmp_path):  # noqa: F811
    host = hosts(0, "--codistill-interval", "2")
    host.step(batch(host), 0)
    for update in range(1, 6):
        host.step(batch(host), update)
    host.task.get_checkpoint_dict()  # fairseq writes it after update 5, and may be killed doing so
    until(lambda: latest(tmp_path, 0) is not None)
    assert latest(tmp_path, 0).resume_floor == 0
    host.step(batch(host), 6)
    until(lambda: latest(tmp_path, 0).resume_floor == 4)


# --- weight decay ---------------------------------------------------------------------------------------------------


def test_scheduled_weight_decay_reaches_the_groups_that_had_some(hosts):  # noqa: F811
    host = two_groups(hosts(0, *ALONE, *SCHEDULE))
    found = {}
    for update in (0, 4, 5, 9, 10):
        host.step(batch(host), update)
        found[update] = decays(host)
    assert found == {0: [0.1, 0.0], 4: [0.1, 0.0], 5: [0.0, 0.0], 9: [0.0, 0.0], 10: [0.3, 0.0]}


def test_after_a_resume_in_a_phase_without_decay_the_right_groups_get_it_again(hosts):  # noqa: F811
    host = two_groups(hosts(0, *ALONE, *SCHEDULE))
    for update in (0, 6):
        host.step(batch(host), update)
    state, saved = host.task.get_checkpoint_dict()["TranslationTask"], host.optimizer.state_dict()
    resumed = two_groups(hosts(0, *ALONE, *SCHEDULE))
    resumed.task.set_checkpoint_dict(state)
    resumed.optimizer.load_state_dict(saved)
    assert decays(resumed) == [0.0, 0.0]
    resumed.step(batch(resumed), 7)
    assert decays(resumed) == [0.0, 0.0]
    resumed.step(batch(resumed), 10)
    assert decays(resumed) == [0.3, 0.0]


def test_a_resume_without_our_state_in_a_phase_without_decay_goes_on_with_the_schedule(hosts):  # noqa: F811
    host = hosts(0, *ALONE, *SCHEDULE)
    for update in (0, 6):
        host.step(batch(host), update)
    saved = host.optimizer.state_dict()
    resumed = hosts(0, *ALONE, *SCHEDULE)  # --reset-dataloader: nobody calls set_checkpoint_dict
    resumed.optimizer.load_state_dict(saved)
    resumed.step(batch(resumed), 7)
    assert set(decays(resumed)) == {0.0}
    resumed.step(batch(resumed), 10)
    assert set(decays(resumed)) == {0.3}


def test_weight_decay_may_follow_epochs(hosts):  # noqa: F811
    host = hosts(0, *ALONE, "--weight-decay", "0.1", "--codistill-weight-decay", "0:0.1,2:0.01")
    for epoch, update in ((1, 0), (2, 10), (3, 20)):
        host.task.begin_epoch(epoch, host.model)
        host.step(batch(host), update)
        assert decays(host) == [0.01 if epoch == 3 else 0.1]


def test_a_schedule_without_any_weight_decay_to_start_from_is_one_line(hosts):  # noqa: F811
    host = hosts(0, *ALONE, "--codistill-weight-decay", "0:0.1,5u:0")
    with pytest.raises(SystemExit) as ended:
        host.step(batch(host), 0)
    assert ended.value.code == (
        "--codistill-weight-decay: --weight-decay is 0, so no parameter has any; "
        "give --weight-decay any value above 0, which the schedule then replaces"
    )


def test_a_schedule_goes_with_an_optimiser_that_gives_its_groups_one_by_one(hosts):  # noqa: F811
    host = two_groups(hosts(0, *ALONE, *SCHEDULE))
    whole = host.optimizer

    class OneByOne:
        """As fairseq's composite optimizer does."""

        @property
        def param_groups(self):
            yield from whole.param_groups

        def __getattr__(self, name):
            return getattr(whole, name)

    host.optimizer = OneByOne()
    for update, wanted in ((0, [0.1, 0.0]), (5, [0.0, 0.0]), (10, [0.3, 0.0])):
        host.step(batch(host), update)
        assert [group["weight_decay"] for group in whole.param_groups] == wanted


def test_what_a_checkpoint_says_of_another_number_of_groups_is_forgotten(hosts):  # noqa: F811
    host = two_groups(hosts(0, *ALONE, *SCHEDULE))
    host.task.set_checkpoint_dict({"codistill": {"decaying": [True], "init_hash": "0" * 64, "run_id": "another"}})
    host.step(batch(host), 0)
    assert decays(host) == [0.1, 0.0]


# --- the end --------------------------------------------------------------------------------------------------------


def test_the_end_of_training_publishes_a_final_snapshot_of_the_last_update(hosts, tmp_path):  # noqa: F811
    metrics.reset()
    host = hosts(0)
    for update in (0, 1, 2):
        host.step(batch(host), update)
    metrics.log_scalar("num_updates", 3, weight=0)  # as the trainer does
    say(END)
    found = latest(tmp_path, 0)
    assert (found.closed, found.manifest.final, found.manifest.update) == (True, True, 3)
    assert lines(host)[-1]["update"] == 3


@pytest.mark.parametrize(
    ("limits", "said", "final"),
    [
        (["--max-update", "9"], [OUT_OF_TIME], False),
        (["--max-epoch", "1"], [OUT_OF_TIME], False),  # in the midst of it, for all that is known
        (["--max-update", "3"], [OUT_OF_TIME], True),
        (["--max-update", "9"], [], True),  # such as by --patience
        (["--max-epoch", "1"], [], True),
    ],
)
def test_a_training_that_the_clock_has_stopped_is_final_only_when_it_is_through(
    hosts,  # noqa: F811
    tmp_path,
    limits,
    said,
    final,
):
    metrics.reset()
    host = hosts(0, "--stop-time-hours", "1", *limits)
    for update in (0, 1, 2):
        host.step(batch(host), update)
    metrics.log_scalar("num_updates", 3, weight=0)
    for line in (*said, END):
        say(line)
    found = latest(tmp_path, 0)
    assert (found.manifest.final, found.closed) == (final, final)


def test_the_end_is_noticed_where_the_log_does_not_show_it_as_on_all_workers_but_the_first(
    hosts,  # noqa: F811
    tmp_path,
    caplog,
):
    caplog.set_level(logging.WARNING, "fairseq_cli.train")
    host = hosts(0)
    host.step(batch(host), 0)
    say(END)
    assert latest(tmp_path, 0).closed
    assert END not in caplog.text


def test_the_log_still_says_what_it_is_told_and_after_the_end_is_as_it_was(hosts, caplog):  # noqa: F811
    log = logging.getLogger("fairseq_cli.train")
    as_it_was = log.info
    host = hosts(0, *ALONE)
    host.step(batch(host), 0)
    assert log.info != as_it_was
    log.info("Saved checkpoint %s", "last")
    log.info({"not": "text"})
    say(END)
    assert [record.getMessage() for record in caplog.records if record.name == log.name] == [
        "Saved checkpoint last",
        "{'not': 'text'}",
        END,
    ]
    assert {record.pathname for record in caplog.records if record.name == log.name} == {__file__}
    assert log.info == as_it_was


def test_the_end_after_a_resume_is_at_the_trainers_update_and_not_at_that_of_the_checkpoint(hosts, tmp_path):  # noqa: F811
    metrics.reset()
    metrics.log_scalar("num_updates", 7, weight=0)
    saved = metrics.state_dict()
    host = hosts(0)
    metrics.load_state_dict(saved)
    host.step(batch(host), 7)
    metrics.log_scalar("num_updates", 8, weight=0)
    say(END)
    assert latest(tmp_path, 0).manifest.update == 8


def test_a_process_that_ends_otherwise_leaves_no_final_snapshot(hosts, tmp_path):  # noqa: F811
    host = hosts(0)
    for update in (0, 1):
        host.step(batch(host), update)
    say("end of epoch 1 (average epoch stats below)")
    host.codistiller.close()
    found = latest(tmp_path, 0)
    assert not found.closed
    assert not found.manifest.final


def test_trouble_ends_the_process_with_one_line_when_the_user_asked_for_it(hosts, tmp_path):  # noqa: F811
    other = hosts(1)
    other.leave()
    payload = next((tmp_path / "store").rglob("*.safetensors"))
    payload.write_bytes(payload.read_bytes()[:-1])
    host = hosts(0, "--codistill-on-error", "fail")
    with pytest.raises(SystemExit) as ended:
        host.take_up()
    assert str(ended.value.code).endswith("ended by --codistill-on-error fail")
    assert "\n" not in ended.value.code


def test_peers_with_another_dictionary_cannot_join_the_run(hosts):  # noqa: F811
    host = hosts(1)
    host.leave()
    other = hosts(0)
    other.task.tgt_dict.add_symbol("another")
    with pytest.raises(SystemExit) as ended:
        other.step(batch(other), 0)
    assert "output" in ended.value.code
    assert "\n" not in ended.value.code


def test_the_fingerprint_is_the_dictionarys_symbols_in_their_order():
    first, second, swapped = dictionary(), dictionary(), dictionary()
    swapped.symbols[-1], swapped.symbols[-2] = swapped.symbols[-2], swapped.symbols[-1]
    assert fingerprint(first) == fingerprint(second)
    assert fingerprint(first) != fingerprint(swapped)
    assert len(fingerprint(first)) == 64
