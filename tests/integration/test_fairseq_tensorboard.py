"""fairseq's own `--tensorboard-logdir` shows our curves beside its own, with nothing of ours switched on for it."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

UPDATES = 20


def test_the_curves_of_a_peer_are_in_fairseqs_tensorboard_with_the_numbers_that_it_logs(trainings):
    shown = trainings.folder / "tensorboard"
    peer = trainings.peer(0, "--codistill-sync", "--tensorboard-logdir", shown, updates=UPDATES)
    trainings.peer(1, "--codistill-sync", updates=UPDATES).wait()
    peer.wait()

    events = EventAccumulator(str(shown / "train_inner"))
    events.Reload()
    logged = peer.logged()
    ours = {key for key in logged[-1] if key.startswith("codistill_")}
    assert {"codistill_loss", "codistill_agreement", "codistill_distance", "codistill_staleness"} <= ours
    assert ours | {"loss", "nll_loss"} <= set(events.Tags()["scalars"])
    for key in ours:
        drawn = {point.step: point.value for point in events.Scalars(key)}
        wanted = {int(line["num_updates"]): float(line[key]) for line in logged if key in line}
        assert drawn.keys() == wanted.keys()
        assert all(abs(drawn[step] - wanted[step]) <= 1e-3 * abs(wanted[step]) + 5e-3 for step in drawn), key
