"""fairseq's parts in this process, put together as fairseq-train does: a toy dictionary, task, model, criterion.

The fixture `hosts` makes them; it ends what they have started and takes back what they hooked into fairseq's log.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # fairseq's optimisers do, and importing it makes a folder, which shall not be in a test's own
from fairseq import optim, options, tasks
from fairseq.data import Dictionary, LanguagePairDataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor

import fairseq_codistill  # noqa: F401  (importing registers the criterion and the task)
from tests.fixtures_peers import quick_exchange, until  # noqa: F401  (a fixture that `hosts` asks for)

WORDS = 30
MODEL = (
    *("--arch", "transformer", "--share-all-embeddings", "--dropout", "0"),
    *("--encoder-layers", "1", "--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "16"),
    *("--decoder-layers", "1", "--decoder-embed-dim", "16", "--decoder-ffn-embed-dim", "16"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
)
END = "done training in 1.0 seconds"  # how fairseq's log says so


def dictionary() -> Dictionary:
    made = Dictionary()
    for word in range(WORDS):
        made.add_symbol(f"w{word}")
    return made


def configure(data: Path, *flags: str) -> Any:
    """fairseq's whole configuration from a command line."""
    arguments = [
        str(data),
        "-s",
        "src",
        "-t",
        "tgt",
        "--cpu",
        "--optimizer",
        "adam",
        "--criterion",
        "codistill",
        *MODEL,
    ]
    parsed = options.parse_args_and_arch(options.get_training_parser(), [*arguments, *flags])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fairseq still composes its configuration the way of hydra 1.0
        return convert_namespace_to_omegaconf(parsed)


class Host:
    """One peer: task, model, criterion and optimiser."""

    def __init__(self, data: Path, *flags: str) -> None:
        self.cfg = configure(data, *flags)
        torch.manual_seed(self.cfg.common.seed)
        self.task: Any = tasks.setup_task(self.cfg.task)
        self.model: Any = self.task.build_model(self.cfg.model).train()
        self.criterion: Any = self.task.build_criterion(self.cfg.criterion)
        self.optimizer: Any = optim.build_optimizer(self.cfg.optimizer, list(self.model.parameters()))

    @property
    def codistiller(self) -> Any:
        return self.criterion._hooks.codistiller

    def step(self, sample: dict[str, Any], update: int, **how: Any) -> tuple[float, dict[str, Tensor], dict[str, Any]]:
        """Forward and backward as the trainer asks for them: the loss, the gradients and the logging output."""
        self.optimizer.zero_grad()
        found, _, log = self.task.train_step(sample, self.model, self.criterion, self.optimizer, update, **how)
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return found.item(), gradients, log

    def leave(self, update: int = 4) -> None:
        """Publish the weights as they are, as final ones at `update`, and end."""
        self.task.train_step(batch(self), self.model, self.criterion, self.optimizer, 0)
        self.codistiller.finish(update)

    def take_up(self, peers: int = 1, update: int = 4) -> int:
        """Go on from boundary to boundary until `peers` peers are in use; gives the update it is at."""
        at = update - 1

        def found() -> bool:
            nonlocal at
            at += 1
            self.step(batch(self), at)
            return self.codistiller.metrics()["peers"] == peers

        until(found)
        return at


def sentences(count: int = 6, seed: int = 0, longest: int = 7) -> list[tuple[Tensor, Tensor]]:
    """Pairs of token numbers of differing lengths, each ending in the end-of-sentence symbol."""
    draw = torch.Generator().manual_seed(seed)
    words = dictionary()

    def sentence() -> Tensor:
        length = int(torch.randint(2, longest + 1, (), generator=draw))
        tokens = torch.randint(words.nspecial, len(words), (length,), generator=draw)
        return torch.cat([tokens, torch.tensor([words.eos()])])

    return [(sentence(), sentence()) for _ in range(count)]


def batch(
    host: Host, pairs: Sequence[tuple[Tensor, Tensor]] | None = None, pad_to: int | None = None
) -> dict[str, Any]:
    """What fairseq's collater makes of `pairs`; with `pad_to`, that long on the target side whatever they need."""
    pairs = sentences() if pairs is None else pairs
    words = host.task.target_dictionary
    source, target = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    dataset = LanguagePairDataset(
        source, [len(s) for s in source], words, target, [len(t) for t in target], words, shuffle=False
    )
    lengths = None if pad_to is None else {"source": pad_to, "target": pad_to}
    return dataset.collater([dataset[i] for i in range(len(pairs))], pad_to_length=lengths)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with dictionaries alone."""
    folder = tmp_path / "data"
    folder.mkdir()
    for side in ("src", "tgt"):
        dictionary().save(str(folder / f"dict.{side}.txt"))
    return folder


@pytest.fixture
def hosts(tmp_path: Path, data: Path, quick_exchange: Path) -> Iterator[Callable[..., Host]]:  # noqa: F811
    """Makes peer number I of a run, with a seed and a save dir of its own, and flags."""
    made: list[Host] = []

    def make(peer: int = 0, *flags: str) -> Host:
        place = ("--codistill-dir", str(tmp_path / "store"), "--save-dir", str(tmp_path / f"peer-{peer}"))
        common = ("--codistill-peer", str(peer), "--codistill-interval", "1", "--codistill-timeout", "20")
        made.append(Host(data, "--seed", str(peer + 1), *place, *common, *flags))
        return made[-1]

    yield make
    vars(logging.getLogger("fairseq_cli.train")).pop("info", None)
    for host in made:
        if host.codistiller is not None:
            host.codistiller.close()
