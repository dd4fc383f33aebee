"""The three data sets: what is trained, tuned and reported on, and what no class was trained on."""

from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import digits, faces
from benchmarks.beyond import stdlib
from benchmarks.faces import SIZE, FaceClassifier
from benchmarks.training import FeatureKind, Split

DataName = Literal["digits", "stdlib", "faces"]
KNOWN_DIGITS = 8  # 8 and 9 are held out
LABELS_PER_CLASS = 10  # of the digits
FEATURE_DIM = 64
BATCH_SIZE: dict[DataName, int] = {"digits": 32, "faces": 64, "stdlib": 64}


class Source(NamedTuple):
    """Where faces are, and how many of them to train on."""

    path: Path | None
    most: int


class Data(NamedTuple):
    training: Split
    tuning: Split
    test: Split
    unknown: dict[str, Tensor]  # inputs of no class, by where they are from
    class_names: list[str]


def load(name: DataName, source: Source, seed: int) -> Data:
    """The data; of the digits, the seed draws the few to train on."""
    if name == "digits":
        return _few_digits(seed)
    return _faces(source) if name == "faces" else _texts()


@lru_cache(maxsize=1)
def _texts() -> Data:
    return Data(*stdlib.load())


def _few_digits(seed: int) -> Data:
    half, test = digits.load_split(0)
    known = half.labels < KNOWN_DIGITS
    images, labels = half.images[known], half.labels[known]
    chosen, others = train_test_split(
        torch.arange(len(labels)),
        train_size=LABELS_PER_CLASS * KNOWN_DIGITS,
        random_state=seed,
        stratify=labels,
    )
    reported = test.labels < KNOWN_DIGITS
    return Data(
        Split(images[chosen], labels[chosen]),
        Split(images[others], labels[others]),
        Split(test.images[reported], test.labels[reported]),
        {f"digit {held}": test.images[test.labels == held] for held in (8, 9)},
        [str(digit) for digit in range(KNOWN_DIGITS)],
    )


@lru_cache(maxsize=1)
def _faces(source: Source) -> Data:
    if source.path is None:
        raise ValueError("no path of faces")
    parts = faces.parts(faces.load(source.path), source.most)
    unknown = {"upside down": parts.test.images.flip(-2)[:1000], "digits": _large_digits()[:1000]}
    return Data(parts.training, parts.tuning, parts.test, unknown, parts.class_names)


def _large_digits() -> Tensor:
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32).unsqueeze(1)
    return (F.interpolate(images, size=(SIZE, SIZE), mode="bilinear") * 255 - 128) / 64


def network(name: DataName, kind: FeatureKind, classes: int) -> nn.Module:
    """A classifier that returns features and logits."""
    if name == "digits":
        model: nn.Module = digits.DigitClassifier(kind)
        model.classifier = nn.Linear(FEATURE_DIM, classes)
        return model
    build = FaceClassifier if name == "faces" else stdlib.TextClassifier
    return build(kind, FEATURE_DIM, classes)
