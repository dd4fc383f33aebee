"""The data sets of the study: where samples come from, what is trained on them, and how long."""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks import digits, faces, mobilenet, stdlib
from benchmarks.samples import FeatureKind, Split

KINDS: tuple[FeatureKind, ...] = ("signed", "non-negative", "neck")


class Place(NamedTuple):
    """What the data that a person has to bring is read from."""

    faces: Path | None = None
    weights: Path | None = None


class Sides(NamedTuple):
    """What is trained on, and what is measured: to tune on, or to report."""

    training: Split
    measured: Split


class DataSet(NamedTuple):
    """`sides` takes the place, a seed, and whether a run is for tuning."""

    title: str
    sides: Callable[[Place, int, bool], Sides]
    network: Callable[[Place, FeatureKind, int, float], nn.Module]
    classes: Callable[[Place], int]
    feature_dim: int
    epochs: int
    batch_size: int
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]  # of the network, among which softmax loss alone chooses
    kinds: tuple[FeatureKind, ...] = KINDS
    optimizer: Literal["adam", "sgd"] = "adam"
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    left_out: tuple[str, ...] = ()  # methods


def divided(data: Split, held_out: float | int, seed: int) -> Sides:
    """Two parts with classes in equal shares."""
    kept, others = train_test_split(
        torch.arange(len(data.labels)),
        test_size=held_out,
        random_state=seed,
        stratify=data.labels,
    )
    return Sides(*(Split(data.images[rows], data.labels[rows]) for rows in (kept, others)))


@lru_cache(maxsize=1)
def _halves() -> tuple[Split, Split]:
    return digits.load_split(0)


def _half(_: Place, seed: int, tuning: bool) -> Sides:
    training, test = digits.load_split(seed)
    return divided(training, 0.25, seed) if tuning else Sides(training, test)


LABELS = 10


def _few(_: Place, seed: int, tuning: bool) -> Sides:
    """Another few of the one half for each seed; tuned on its rest, reported on the other half."""
    half, test = _halves()
    rest, few = divided(half, LABELS * digits.NUM_CLASSES, seed)
    return Sides(few, rest if tuning else test)


@lru_cache(maxsize=1)
def _texts() -> stdlib.Texts:
    return stdlib.load()


def _text(_: Place, __: int, tuning: bool) -> Sides:
    texts = _texts()
    return Sides(texts.training, texts.tuning if tuning else texts.test)


@lru_cache(maxsize=1)
def _faces(path: Path, most: int) -> faces.Parts:
    return faces.parts(faces.load(path), most)


FACES = 5000


def _expressions(place: Place, _: int, tuning: bool) -> Sides:
    if place.faces is None:
        raise ValueError("no path of faces")
    parts = _faces(place.faces, FACES)
    return Sides(parts.training, parts.tuning if tuning else parts.test)


def fingerprint(path: Path) -> str:
    """Tells one set of faces from another."""
    found = faces.load(path)
    digest = hashlib.sha256(found.images.tobytes() + found.labels.tobytes()).hexdigest()
    return f"{len(found.labels)} faces, {digest[:12]}"


_DIGITS = DataSet(
    "digits, half of 1,797",
    _half,
    lambda _, kind, classes, scale: digits.DigitClassifier(kind, scale, classes),
    lambda _: digits.NUM_CLASSES,
    feature_dim=digits.FEATURE_DIM,
    epochs=30,
    batch_size=32,
    seeds=10,
    tuning_seeds=3,
    rates=(0.001, 0.003, 0.01),
)
DATA = {
    "digits": _DIGITS,
    "few": _DIGITS._replace(
        title="digits, 10 labels a class", sides=_few, epochs=60, rates=(0.003, 0.01, 0.03)
    ),
    "text": DataSet(
        "source code as text, 14 packages",
        _text,
        lambda _, kind, classes, __: stdlib.TextClassifier(kind, 64, classes),
        lambda _: len(_texts().class_names),
        feature_dim=64,
        epochs=15,
        batch_size=32,
        seeds=10,
        tuning_seeds=3,
        rates=(0.001, 0.003, 0.01),
    ),
    "faces": DataSet(
        f"FER-2013, {FACES:,} faces, small network",
        _expressions,
        lambda _, kind, classes, __: faces.FaceClassifier(kind, 128, classes),
        lambda _: len(faces.CSV_CLASSES),
        feature_dim=128,
        epochs=8,
        batch_size=100,
        seeds=5,
        tuning_seeds=1,
        rates=(0.003, 0.01, 0.03),
        augment=faces.mirrored,
    ),
    "pretrained": DataSet(
        f"FER-2013, {FACES:,} faces, pretrained MobileNetV2",
        _expressions,
        lambda place, kind, classes, _: mobilenet.FaceClassifier(place.weights, kind, classes),
        lambda _: len(faces.CSV_CLASSES),
        feature_dim=mobilenet.FEATURE_DIM,
        epochs=4,
        batch_size=100,
        seeds=5,
        tuning_seeds=1,
        rates=(0.01,),
        kinds=("non-negative", "neck"),
        optimizer="sgd",
        augment=faces.mirrored,
        left_out=("island", "triplet", "cosface"),
    ),
}
