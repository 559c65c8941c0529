"""Every codistillation option: its default, its help text and what it may be.

Both plug-ins generate their flags from `CodistillConfig`, so an option is written down once. `validate()` is where
values are judged, whichever way they came (command line, YAML, keyword): a bad one raises `ConfigError`, one line that
names the flag, the value given, what is allowed and what to do.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Optional

from codistill.schedules import Alpha, Piecewise, ScheduleError

LOSSES = ("kl", "mse", "ce")
SCHEMES = ("file", "s3", "gs", "az")
WIRE_DTYPES = ("float32", "bfloat16", "float16")
EXCHANGES = ("checkpoint", "prediction")
PUBLISHED = ("raw", "ema")
TOPOLOGY = re.compile(r"all|ring|random-([1-9][0-9]{0,3})")
RENDEZVOUS = re.compile(r"tcp://[^/:\s]+:([1-9][0-9]{0,4})")
ON_ERROR = ("continue", "fail")
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_PEERS = 1024
MAX_TIMEOUT = 1_000_000  # seconds: clocks that a wait is measured by overflow, far above
STALE_INTERVALS = 10
_WANTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot work; `str()` is one line for the person who set it."""


def flag(name: str) -> str:
    """The command-line spelling of option `name`, e.g. `burn_in` -> `--codistill-burn-in`."""
    return "--codistill-" + name.replace("_", "-")


def option(default: Any, help: str, choices: Optional[tuple[str, ...]] = None) -> Any:
    """A dataclass field that carries its help text and choices to the plug-ins' parsers."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check_types(options: Any) -> None:
    """Judge that every value of an options object has its field's type; whole numbers pass as numbers.

    Raises:
        ConfigError: on the first that has not.
    """
    hints = typing.get_type_hints(type(options))
    for item in dataclasses.fields(options):
        value, kinds = getattr(options, item.name), typing.get_args(hints[item.name]) or (hints[item.name],)
        accepted = (*kinds, int) if float in kinds else kinds
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{flag(item.name)} {value!r}: must be {_WANTED[kinds[0]]}")


@dataclass
class DataConfig:
    """Which part of the training set to use; a baseline and the peers compared with it use the same."""

    data_fraction: float = option(1.0, "train on this fraction of the training set, above 0 and up to 1")
    data_seed: int = option(
        0,
        "which items the fraction holds, how shards are cut, and the order with exchange by prediction; "
        "the same for all trainings that are compared, and for all peers of a run",
    )
    data_shard: bool = option(
        False,
        "train on this peer's own part of the training set (or of its fraction): one of as many as there are peers",
    )

    def __post_init__(self) -> None:
        """Judge the values at once.

        Raises:
            ConfigError: when the fraction is not one.
        """
        check_types(self)
        if not 0 < self.data_fraction <= 1:
            raise ConfigError(
                f"{flag('data_fraction')} {self.data_fraction}: must be above 0 and at most 1; "
                "leave it out to train on everything"
            )
        if self.data_seed < 0:
            raise ConfigError(f"{flag('data_seed')} {self.data_seed}: must be 0 or more")


@dataclass
class CodistillConfig:
    """What one peer is told. Updates are optimiser steps, counted by the host framework."""

    dir: Optional[str] = option(
        None,
        "where the peers leave their snapshots: a folder all of them reach, or s3://, gs://, az:// "
        "(credentials come from the environment); not needed with one peer",
    )
    exchange: str = option(
        "checkpoint",
        "what peers know each other by: checkpoint, weights that come now and then, or prediction, the logits of each "
        "batch, which all peers then go through in step, over a fast and trusted network",
        EXCHANGES,
    )
    rendezvous: Optional[str] = option(
        None,
        "with exchange by prediction, where the jobs find each other: tcp://HOST:PORT, HOST being the machine of peer "
        "0 and PORT free there; without it they find each other through the dir",
    )
    topology: str = option(
        "all",
        "whom a peer learns from, with exchange by checkpoint: all others, ring (the peer before it), or random-K, "
        "such as random-2 (K others, drawn anew at every interval); absent peers are passed over",
    )
    run_id: str = option("default", "name of the run below the dir; peers that share it codistil with each other")
    peer: int = option(0, "number of this peer, from 0; each job of a run has its own")
    peers: int = option(2, "number of peers in the run; 1: no exchange, only the schedules and metrics")
    interval: int = option(500, "publish a snapshot, and take up new ones, every so many updates")
    loss: str = option(
        "kl",
        "distance between the predictions: kl (peer || own), ce (peer's probabilities as targets), mse (logits)",
        LOSSES,
    )
    temperature: float = option(1.0, "softmax temperature of kl and ce; the penalty is scaled by its square")
    alpha: float = option(1.0, "weight of the penalty; 0 switches it off")
    alpha_growth: float = option(1.0, "multiply alpha by this every --codistill-alpha-every")
    alpha_every: str = option("epoch", "how often alpha grows: 'epoch', or a number of updates")
    alpha_max: float = option(math.inf, "alpha grows no further than this")
    burn_in: int = option(0, "no penalty in the first so many updates")
    max_staleness: int = option(
        0,
        "stop using a peer that has sent nothing new for so many of our own updates, until it does again; "
        f"0: {STALE_INTERVALS} intervals",
    )
    on_error: str = option(
        "continue", "what trouble with a peer or the store does to training: continue without it, or fail", ON_ERROR
    )
    sync: bool = option(
        False, "at every interval wait for the other peers' snapshots of the same update: slower, but deterministic"
    )
    timeout: float = option(
        300.0, "longest wait, in seconds, for the store at the end, and for the other peers with sync"
    )
    dtype: str = option("float32", "precision of the weights in a snapshot, or of the logits sent", WIRE_DTYPES)
    topk: int = option(
        0, "with exchange by prediction, send only the so many largest logits of each position; 0: all of them"
    )
    publish: str = option(
        "raw", "weights in a snapshot: raw, or ema, the moving average that the host framework keeps", PUBLISHED
    )
    keep: int = option(3, "snapshots of this peer left on the store; with sync as many more as a restart may need")
    weight_decay: Optional[str] = option(
        None,
        "piecewise weight decay, e.g. '0:1e-4,18:1e-5,38:0': from that many completed epochs on ('5000u': updates); "
        "parameter groups without decay keep none",
    )

    def __post_init__(self) -> None:
        """Judge the values at once: no half-valid config exists."""
        self.validate()

    def validate(self) -> None:
        """Check every option and the combinations.

        Raises:
            ConfigError: on the first that cannot work.
        """
        check_types(self)
        self._check_numbers()
        self._check_choices()
        self._check_place()
        self._check_exchange()
        self.alpha_schedule()
        self.weight_decay_schedule()

    def alpha_schedule(self) -> Alpha:
        """The penalty's weight as a function of update and epoch."""
        every = self.alpha_every
        if every != "epoch" and not (every.isdecimal() and int(every) >= 1):
            raise self.error("alpha_every", "must be 'epoch' or a number of updates, 1 or more")
        return Alpha(
            alpha=self.alpha,
            burn_in=self.burn_in,
            growth=self.alpha_growth,
            every="epoch" if every == "epoch" else int(every),
            cap=self.alpha_max,
        )

    def weight_decay_schedule(self) -> Optional[Piecewise]:
        """The piecewise weight decay, or None when none was asked for."""
        return self.piecewise("weight_decay", self.weight_decay)

    @staticmethod
    def piecewise(name: str, text: Optional[str]) -> Optional[Piecewise]:
        """Parse the schedule given to option `name`; None stays None."""
        if text is None:
            return None
        try:
            return Piecewise.parse(text)
        except ScheduleError as error:
            raise ConfigError(f"{flag(name)} {text}: {error}") from None

    def changed(self) -> dict[str, Any]:
        """The options that do not have their defaults."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {item.name: values[item.name] for item in dataclasses.fields(self) if values[item.name] != item.default}

    @property
    def coordinated(self) -> bool:
        """Whether all peers go through the same batches in step, as exchange by prediction needs it."""
        return self.exchange == "prediction" and self.peers > 1 and self.alpha > 0

    @property
    def staleness_bound(self) -> int:
        """Own updates without anything new after which a peer is no longer used."""
        return self.max_staleness or STALE_INTERVALS * self.interval

    def error(self, name: str, rule: str) -> ConfigError:
        """A `ConfigError` about option `name`: the flag, its value, the rule."""
        value = getattr(self, name)
        return ConfigError(f"{flag(name)} {value if str(value).isprintable() else repr(value)}: {rule}")

    def _check_numbers(self) -> None:
        if self.peers < 1 or self.peers > MAX_PEERS:
            raise self.error("peers", f"must be between 1 and {MAX_PEERS}")
        if not 0 <= self.peer < self.peers:
            raise self.error(
                "peer",
                f"must be between 0 and {self.peers - 1}, since {flag('peers')} is {self.peers}; number peers from 0",
            )
        for name, least in (("interval", 1), ("burn_in", 0), ("max_staleness", 0), ("keep", 2)):
            if getattr(self, name) < least:
                raise self.error(name, f"must be {least} or more")
        if 0 < self.max_staleness < self.interval:
            raise self.error("max_staleness", f"must be 0 or at least {flag('interval')} ({self.interval})")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise self.error("alpha", "must be a finite number, 0 or more")
        for name in ("temperature", "alpha_growth"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise self.error(name, "must be a finite number above 0")
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise self.error("timeout", f"must be above 0 and at most {MAX_TIMEOUT} seconds")
        if not self.alpha_max >= self.alpha:
            raise self.error("alpha_max", f"must be at least {flag('alpha')} ({self.alpha}); leave it out for no cap")

    def _check_choices(self) -> None:
        for item in dataclasses.fields(self):
            allowed = item.metadata["choices"]
            if allowed and getattr(self, item.name) not in allowed:
                raise self.error(item.name, f"must be one of {', '.join(allowed)}")
        if self.loss == "mse" and self.temperature != 1:
            raise self.error("temperature", f"{flag('loss')} mse compares logits and has no temperature; leave it out")

    def _check_place(self) -> None:
        if not RUN_ID.fullmatch(self.run_id):
            raise self.error(
                "run_id", "must be 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or digit"
            )
        if self.dir is None or not self.dir.strip():
            if self.peers > 1 and self.rendezvous is None:
                raise ConfigError(
                    f"{flag('dir')} is missing: {self.peers} peers need a folder or bucket that all of them reach, "
                    f"e.g. {flag('dir')} /shared/codistill or s3://bucket/path"
                )
            return
        scheme, separator, _ = self.dir.partition("://")
        if separator and scheme not in SCHEMES:
            schemes = ", ".join(f"{known}://" for known in SCHEMES)
            # The rest of the URL may hold credentials.
            raise ConfigError(f"{flag('dir')} {scheme}://…: must be a folder or start with one of {schemes}")

    def _check_exchange(self) -> None:
        """What goes with one kind of exchange only."""
        if not TOPOLOGY.fullmatch(self.topology):
            raise self.error("topology", "must be all, ring, or random-K with a number K, such as random-2")
        if self.topk < 0:
            raise self.error("topk", "must be 0 or more")
        if self.rendezvous is not None:
            parts = RENDEZVOUS.fullmatch(self.rendezvous)
            if parts is None or int(parts[1]) > 65535:
                raise self.error("rendezvous", "must be tcp://HOST:PORT, HOST being the machine of peer 0")
        by_prediction = self.exchange == "prediction"
        for name in ("topology", "sync", "publish", "keep", "max_staleness"):
            if by_prediction and name in self.changed():
                raise self.error(name, f"has no meaning with {flag('exchange')} prediction; leave one of them out")
        for name in ("rendezvous", "topk"):
            if not by_prediction and name in self.changed():
                raise self.error(
                    name, f"has no effect without {flag('exchange')} prediction; add it, or leave this out"
                )
        if self.topk and self.loss == "mse":
            raise self.error("topk", f"{flag('loss')} mse compares all logits; leave it out, or choose kl or ce")
