"""BANKING77 and CLINC150: sentences, each with the intent of who asks."""

import csv
import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.data import Split, stratified

WORDS, LENGTH = 8192, 60  # rows of the embedding, and most words and pairs of a sentence
LAYOUTS = (
    "expected a JSON file {split: [[sentence, intent], ...]} with train, valid or val, and test, "
    "as CLINC150 has it, or a folder with BANKING77's train.csv and test.csv"
)


@cache
def load(path: Path) -> dict[str, Split]:
    """Parts to train on, to tune on ("valid") and to report ("test"); else a ValueError.

    Without a part to tune on, 20 sentences of each intent are held out from training.
    """
    try:
        parts = _read(path)
        numbers = {one: i for i, one in enumerate(sorted({one for _, one in parts["train"]}))}
        found = {}
        for name in {"train", "valid", "val", "test"} & {*parts}:
            labels = torch.tensor([numbers[intent] for _, intent in parts[name]])
            texts = encoded([text for text, _ in parts[name]])
            found[name.removesuffix("id")] = Split(texts, labels)
        if "val" not in found:
            found["train"], found["val"] = stratified(found["train"], 20 * len(numbers), 0)
        return {"train": found["train"], "valid": found["val"], "test": found["test"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no intents ({error!r}): {LAYOUTS}") from error


def _read(path: Path) -> dict[str, list[list[str]]]:
    if not path.is_dir():
        found: dict[str, list[list[str]]] = json.loads(path.read_text())
        return found
    parts = {}
    for name in ("train", "test"):
        with (path / f"{name}.csv").open(newline="") as lines:
            parts[name] = [*csv.reader(lines)][1:]
    return parts


def encoded(texts: list[str]) -> Tensor:
    """Numbers of words and of pairs of words, (N, LENGTH), from 1 on; 0 after the last."""
    numbers = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(numbers, texts, strict=True):
        words = re.findall(r"[a-z0-9']+", text.lower())
        words += [f"{first} {second}" for first, second in pairwise(words)]
        hashed = [1 + crc32(word.encode()) % (WORDS - 1) for word in words[:LENGTH]]
        row[: len(hashed)] = torch.tensor(hashed)
    return numbers
