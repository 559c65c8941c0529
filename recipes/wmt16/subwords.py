"""Cuts a translation data set into joined subwords: python subwords.py FOLDER OUT SOURCE TARGET SIZE.

Reads {train,valid,test}.{SOURCE,TARGET} of FOLDER, writes the same names to OUT. sentencepiece learns the subwords from
both languages of the training set. An interrupted call is simply repeated.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sentencepiece

SENTENCES = 10_000_000  # learnt from at most so many lines, drawn at random


def main(folder: Path, out: Path, languages: tuple[str, str], size: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(folder / f"train.{language}") for language in languages],
        model_prefix=str(out / "subwords"),
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        input_sentence_size=SENTENCES,
        shuffle_input_sentence=True,
        minloglevel=1,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(out / "subwords.model"))
    for split in ("train", "valid", "test"):
        for language in languages:
            name = f"{split}.{language}"
            # A stray carriage return ends no line: each sentence stays beside its translation.
            with (
                open(folder / name, encoding="utf-8", newline="\n") as lines,
                open(out / name, "w", encoding="utf-8") as encoded,
            ):
                for line in lines:
                    encoded.write(" ".join(pieces.encode(" ".join(line.split()), out_type=str)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3], sys.argv[4]), int(sys.argv[5]))
