"""How long does one exchange hold the training thread, beyond the copies? (goal: at most 50 ms for a 100 MB model)"""

import statistics
import time
from collections.abc import Iterator

from benchmarks.transformer import Size, Training, exchanging
from benchmarks.update_cost import seconds
from codistill.exchange.snapshot import HostBuffer, load

SIZE = Size(classes=16000, width=512, layers=4, sentences=4)
EXCHANGES = 10
INTERVAL = 20


def measure() -> Iterator[str]:
    with exchanging(SIZE, INTERVAL) as ((training, codistiller), (elsewhere, other)):
        state, peer = training.model.state_dict(), Training(SIZE, seed=3).model.state_dict()
        buffer = HostBuffer(state, "float32")
        held, out, back, taken_up = [], [], [], 0
        for number in range(EXCHANGES):
            update = (1000 + number) * INTERVAL
            elsewhere.update()
            other.begin_update(update, epoch=1)
            time.sleep(3)  # until the other peer's snapshot has been fetched and verified
            out.append(seconds(lambda: buffer.fill(state)))
            back.append(seconds(lambda: load(peer, buffer.tensors())))
            held.append(seconds(lambda update=update: codistiller.begin_update(update, epoch=1)))
            now = codistiller.metrics()
            taken_up += now["peers"] == 1 and now["staleness"] == 0
        copies = statistics.median(out) + statistics.median(back)
    beyond = [1000 * (time_held - copies) for time_held in held]
    yield (
        f"{buffer.nbytes / 1e6:.0f} MB: held {1000 * statistics.median(held):.0f} ms, of which copies out and in "
        f"{1000 * copies:.0f} ms; beyond them {statistics.median(beyond):.0f} ms "
        f"(worst {max(beyond):.0f} ms; {taken_up} of {EXCHANGES} exchanges took up a snapshot)"
    )
