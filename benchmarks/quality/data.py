"""The data sets of the study: which samples, which network, and how long it is trained."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from benchmarks import networks
from benchmarks.data import KINDS, FeatureKind, Split, faces, load_digits, stratified, text
from benchmarks.networks import Classifier


class Files(NamedTuple):
    """What the user has to bring."""

    faces: Path | None = None
    weights: Path | None = None


def adamw(model: nn.Module, rate: float, steps: int) -> tuple[Optimizer, LRScheduler]:
    """AdamW in one cycle."""
    optimizer = AdamW(model.parameters(), weight_decay=0.01)
    return optimizer, OneCycleLR(optimizer, rate, total_steps=steps)


def sgd(model: nn.Module, rate: float, steps: int) -> tuple[Optimizer, LRScheduler]:
    """SGD along a cosine."""
    optimizer = SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    return optimizer, CosineAnnealingLR(optimizer, steps)


class DataSet(NamedTuple):
    """`load` takes files, a seed, and whether to tune; it gives what is trained on and measured."""

    title: str
    load: Callable[[Files, int, bool], tuple[Split, Split]]
    network: Callable[[Files, FeatureKind, int, float], Classifier]
    epochs: int
    batch_size: int
    seeds: int
    tuning_seeds: int
    rates: tuple[float, ...]  # of the network, among which softmax loss alone chooses
    kinds: tuple[FeatureKind, ...] = KINDS
    optimizer: Callable[[nn.Module, float, int], tuple[Optimizer, LRScheduler]] = adamw
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, _: images
    left_out: tuple[str, ...] = ()  # methods
    needs: tuple[str, ...] = ()  # of Files


FEW, MOST_FACES = 10, 5000
_digits, _texts = cache(load_digits), cache(text.load)
_faces = cache(lambda path: faces.split_faces(faces.load(path), MOST_FACES))


def _load_digits(_: Files, seed: int, tuning: bool) -> tuple[Split, Split]:
    training, test = _digits(seed)
    return stratified(training, 0.25, seed) if tuning else (training, test)


def _load_few(_: Files, seed: int, tuning: bool) -> tuple[Split, Split]:
    """Draws other labels of one half for each seed; tunes on its rest, reports the other half."""
    half, test = _digits(0)
    rest, few = stratified(half, FEW * 10, seed)
    return few, rest if tuning else test


def _load_text(_: Files, __: int, tuning: bool) -> tuple[Split, Split]:
    return _texts()["training"], _texts()["tuning" if tuning else "test"]


def _load_faces(files: Files, _: int, tuning: bool) -> tuple[Split, Split]:
    training, tuned, test = _faces(files.faces)
    return training, tuned if tuning else test


_DIGITS = DataSet(
    "digits, half of 1,797",
    _load_digits,
    lambda _, kind, classes, scale: networks.digit_classifier(kind, classes, scale),
    epochs=30,
    batch_size=32,
    seeds=10,
    tuning_seeds=3,
    rates=(0.001, 0.003, 0.01),
)
_FACES = DataSet(
    f"FER-2013, {MOST_FACES:,} faces, small network",
    _load_faces,
    lambda _, kind, classes, __: networks.face_classifier(kind, classes),
    epochs=8,
    batch_size=100,
    seeds=5,
    tuning_seeds=1,
    rates=(0.003, 0.01, 0.03),
    augment=faces.mirrored,
    needs=("faces",),
)
DATA = {
    "digits": _DIGITS,
    "few": _DIGITS._replace(
        title=f"digits, {FEW} labels a class", load=_load_few, epochs=60, rates=(0.003, 0.01, 0.03)
    ),
    "text": _DIGITS._replace(
        title="source code as text, 14 packages",
        load=_load_text,
        network=lambda _, kind, classes, __: networks.text_classifier(kind, classes),
        epochs=15,
    ),
    "faces": _FACES,
    "pretrained": _FACES._replace(
        title=f"FER-2013, {MOST_FACES:,} faces, pretrained MobileNetV2",
        network=lambda files, kind, classes, _: networks.pretrained_face_classifier(
            kind, classes, files.weights
        ),
        epochs=4,
        rates=(0.01,),
        kinds=("non-negative", "neck"),
        optimizer=sgd,
        left_out=("island", "triplet", "cosface"),
        needs=("faces", "weights"),
    ),
}
