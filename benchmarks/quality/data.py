"""The data sets of the study: samples, networks, and the rows of their tables."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from benchmarks import networks
from benchmarks.data import FeatureKind, Split, all_digits, cifar10, drawn, intents, stratified
from benchmarks.data.text import HASHED, load_texts
from benchmarks.networks import Classifier
from benchmarks.training import METHODS, PAPER_WEIGHT


class Files(NamedTuple):
    """What the user has to bring."""

    banking77: Path | None = None
    clinc150: Path | None = None
    cifar10: Path | None = None


class Row(NamedTuple):
    """A row of a table: a method with its tuned weight, or with a fixed one."""

    method: str
    weight: float | None = None
    scale: float = 1.0  # of the features

    @property
    def title(self) -> str:
        """As the tables say it."""
        scaled = "" if self.scale == 1 else f", features times {self.scale:g}"
        return METHODS[self.method].title + scaled

    @property
    def tuned(self) -> bool:
        """Whether tuning chooses the weight."""
        return self.weight is None and bool(METHODS[self.method].start)


SOFTMAX, PAPER, TUNED = Row("softmax"), Row("paper", PAPER_WEIGHT), Row("simplex")
ONE, THREE = Row("simplex", 1.0), Row("simplex", 3.0)
PEERS = tuple(Row(name) for name in ("center", "proxy_anchor", "supcon", "triplet", "cosface"))
FIXED = (SOFTMAX, ONE, THREE)
ALL = (SOFTMAX, *PEERS, PAPER, ONE, THREE, TUNED)
BALANCED = (Row("softmax_balanced"), Row("simplex_balanced", 1.0))
LONG = tuple(row._replace(scale=100.0) for row in FIXED)

Splits = tuple[Split, Split]
Schedule = tuple[Optimizer, LRScheduler]


def adamw(model: nn.Module, rate: float, steps: int) -> Schedule:
    """AdamW in one cycle."""
    optimizer = AdamW(model.parameters(), weight_decay=0.01, fused=True)
    return optimizer, OneCycleLR(optimizer, rate, total_steps=steps)


def sgd(model: nn.Module, rate: float, _: int) -> Schedule:
    """SGD at a constant rate."""
    optimizer = SGD(model.parameters(), rate, momentum=0.9)
    return optimizer, LambdaLR(optimizer, lambda _: 1.0)


class DataSet(NamedTuple):
    """`load` takes files, a seed, and whether to tune; it gives what is trained on and measured."""

    title: str
    load: Callable[[Files, int, bool], Splits]
    network: Callable[[FeatureKind, int], Classifier]
    rows: Mapping[FeatureKind, tuple[Row, ...]]
    epochs: int
    batch_size: int
    start: tuple[float, ...]  # rates of the network, among which softmax loss alone chooses
    seeds: int = 10
    tuning_seeds: int = 3
    optimizer: Callable[[nn.Module, float, int], Schedule] = adamw
    augment: Callable[[Tensor, torch.Generator], Tensor] = lambda images, _: images
    needs: str | None = None  # of Files


RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


@cache
def _digits() -> tuple[Split, Split, Split]:
    """Parts to draw from (104 to 107 a class), to tune on and to report; always the same."""
    rest, test = stratified(all_digits(), 0.28, 0)
    return (*stratified(rest, 236, 0), test)


def _load_digits(counts: list[int], _: Files, seed: int, tuning: bool) -> Splits:
    training, tuned, test = _digits()
    return drawn(training, counts, seed), tuned if tuning else test


def _load_code(_: Files, __: int, tuning: bool) -> Splits:
    parts = load_texts()
    return parts["training"], parts["tuning" if tuning else "test"]


def _load_intents(name: str, counts: list[int], files: Files, seed: int, tuning: bool) -> Splits:
    parts = intents.load(getattr(files, name))
    return drawn(parts["train"], counts, seed), parts["valid" if tuning else "test"]


def _load_pictures(files: Files, seed: int, tuning: bool) -> Splits:
    assert files.cifar10 is not None
    parts = cifar10.load(files.cifar10)
    pictures = cifar10.floats(drawn(parts["train"], [700] * 10, seed))
    training, tuned = stratified(pictures, 2000, seed)
    return training, tuned if tuning else cifar10.floats(parts["test"])


def _load_vectors(_: Files, seed: int, __: bool) -> Splits:
    """Vectors around 100 random prototypes: 600 batches of 64, none of them twice."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(100, 64, generator=generator)
    labels = torch.randint(100, (38_400 + 5_000,), generator=generator)
    noise = 1.2 * torch.randn(len(labels), 64, generator=generator)
    vectors = prototypes[labels] + noise
    return Split(vectors[:38_400], labels[:38_400]), Split(vectors[38_400:], labels[38_400:])


_DIGITS = DataSet(
    "digits, 10 labels a class",
    partial(_load_digits, [10] * 10),
    networks.digit_classifier,
    {"signed": (*ALL, *LONG), "non-negative": (*ALL, *LONG), "neck": FIXED},
    epochs=60,
    batch_size=32,
    start=RATES[1:4],
)
_BANKING = DataSet(
    "BANKING77, 10 labels a class",
    partial(_load_intents, "banking77", [10] * 77),
    networks.intent_classifier,
    {"signed": ALL, "non-negative": FIXED, "neck": FIXED},
    epochs=30,
    batch_size=64,
    start=RATES[2:5],
    needs="banking77",
)
DATA = {
    "banking": _BANKING,
    "clinc": _BANKING._replace(
        title="CLINC150, 10 labels a class",
        load=partial(_load_intents, "clinc150", [10] * 150),
        rows={"signed": ALL},
        needs="clinc150",
    ),
    "digits": _DIGITS,
    "code": _DIGITS._replace(
        title="source code, 14 packages",
        load=_load_code,
        network=partial(networks.vector_classifier, HASHED, 64),
        rows={"signed": ALL, "neck": FIXED},
        epochs=15,
    ),
    "rare-digits": _DIGITS._replace(
        title="digits, 100 or 5 labels a class",
        load=partial(_load_digits, [100, 5] * 5),
        rows={
            "signed": (*ALL, *BALANCED),
            "non-negative": (*FIXED, *BALANCED),
            "neck": (*FIXED, *BALANCED),
        },
        epochs=40,
    ),
    "rare-banking": _BANKING._replace(
        title="BANKING77, 50 or 5 labels a class",
        load=partial(_load_intents, "banking77", ([50, 5] * 39)[:77]),
        rows={"signed": (*ALL, *BALANCED)},
    ),
    "sgd": DataSet(
        "random vectors of 100 classes, plain SGD",
        _load_vectors,
        partial(networks.vector_classifier, 64, 32),
        dict.fromkeys(("signed", "non-negative"), (*FIXED, Row("simplex", 10.0))),
        epochs=1,
        batch_size=64,
        start=(0.05,),
        optimizer=sgd,
    ),
    "cifar10": DataSet(
        "CIFAR-10, 500 labels a class",
        _load_pictures,
        lambda _, classes: networks.picture_classifier(classes),
        {"non-negative": (SOFTMAX, *PEERS[:2], ONE)},
        epochs=8,
        batch_size=100,
        start=RATES[3:6],
        seeds=5,
        tuning_seeds=1,
        augment=cifar10.mirrored,
        needs="cifar10",
    ),
}
