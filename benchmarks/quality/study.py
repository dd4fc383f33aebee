"""Which trainings there are, what is chosen on the tuning parts, and how the losses compare."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.data import KINDS, FeatureKind, Split
from benchmarks.harness import Interval, paired_interval
from benchmarks.quality.data import DATA, Files
from benchmarks.training import (
    FIGURES,
    METHODS,
    PAPER_WEIGHT,
    STARTS,
    CosineHead,
    Figures,
    evaluate,
    learned_centers,
    train_steps,
)


@dataclass(frozen=True)
class Setting:
    """What decides the outcome of a training; `weight` is that of the loss, or its margin."""

    data: str
    kind: FeatureKind
    method: str
    weight: float
    rate: float  # of the network, the highest of its schedule
    seed: int
    epochs: int
    batch_size: int
    tuning: bool = False  # measured on the part to tune on
    scale: float = 1.0  # of the features

    def changes(self) -> str:
        """How it differs from a training of the tables, of which all figures are stored."""
        sized = self.batch_size != DATA[self.data].batch_size
        return (
            (f", batches of {self.batch_size}" if sized else "")
            + (f", scale {self.scale:g}" if self.scale != 1 else "")
            + (", tuning" if self.tuning else "")
        )

    def key(self) -> str:
        """A name that differs between the trainings of a data set."""
        run = f"{self.method} {self.weight:g}, rate {self.rate:g}, seed {self.seed}"
        return f"{self.kind}: {run}{self.changes()}"


def run(
    setting: Setting, files: Files, device: str = "cpu", most: int | None = None
) -> list[float | None]:
    """Trains once, on one thread and at most `most` samples, and returns `FIGURES` in order.

    All methods start from the same weights under the same seed, and see the same batches.
    """
    torch.set_num_threads(1)
    data, method = DATA[setting.data], METHODS[setting.method]
    splits = data.load(files, setting.seed, setting.tuning)
    classes = int(splits[0].labels.max()) + 1
    training, measured = (Split(*(part[:most].to(device) for part in split)) for split in splits)
    torch.manual_seed(setting.seed)
    model = data.network(files, setting.kind, classes, setting.scale).to(device)
    counts = training.labels.bincount(minlength=classes)
    criterion = method.build(counts, model.feature_dim, setting.weight).to(device)
    if method.is_head:
        model.classifier = CosineHead(criterion)
    # A last batch of one sample is left out: it has no variance for BatchNorm1d.
    steps = setting.epochs * -(-(len(training.labels) - 1) // setting.batch_size)
    optimizer, schedule = data.optimizer(model, setting.rate, steps)
    optimizers = [optimizer]
    if not method.is_head and list(criterion.parameters()):
        optimizers.append(torch.optim.SGD(criterion.parameters(), lr=method.center_rate))
    generator = torch.Generator().manual_seed(setting.seed)
    objective = method.objective(criterion, setting.weight)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(training.labels), generator=generator)
        for rows in order.split(setting.batch_size):
            images = data.augment(training.images[rows], generator)
            if len(rows) > 1:
                yield images, training.labels[rows]

    for _ in range(setting.epochs):
        for _ in train_steps(model, batches(), objective, optimizers):
            schedule.step()

    @torch.no_grad()
    def figures(split: Split) -> dict[str, float | None]:
        model.eval()
        outputs = [model(part) for part in split.images.split(500)]
        features, logits = (torch.cat(part) for part in zip(*outputs, strict=True))
        return evaluate(features, logits, split.labels, learned_centers(criterion))

    found = figures(measured)
    if setting.changes():
        return [found["accuracy"]]
    found["train_accuracy"] = figures(training)["accuracy"]
    return [found[name] for name in FIGURES]


class Row(NamedTuple):
    """A row of a table: a method with its tuned weight, or with a fixed one."""

    method: str
    weight: float | None = None
    # In the sweep: a factor of the features, and another size of the batches.
    scale: float = 1.0
    batch_size: int | None = None

    @property
    def title(self) -> str:
        return METHODS[self.method].title

    @property
    def tuned(self) -> bool:
        return self.weight is None and bool(METHODS[self.method].start)


SOFTMAX, CENTER, PAPER = Row("softmax"), Row("center"), Row("paper", PAPER_WEIGHT)
SIMPLEX = tuple(Row("simplex", weight) for weight in STARTS)
ROWS = (
    *(SOFTMAX, CENTER, Row("island"), Row("triplet"), Row("cosface"), PAPER, Row("paper")),
    *(*SIMPLEX, Row("simplex"), Row("balanced")),
)
MORE_ROWS = {
    "digits": (Row("norm"),),
    "few": (Row("norm"), Row("gradient")),
    "text": (Row("norm"),),
}
SWEEP_DATA, SWEEP_SEEDS, SWEEP_ROWS = "digits", 5, (SOFTMAX, PAPER, SIMPLEX[1])
SCALES, BATCH_SIZES = (0.01, 0.1, 1.0, 10.0, 100.0), (16, 256)
Pair = tuple[FeatureKind, str]  # kind of features and method


class Study:
    """The trainings of one data set; `found` holds figures by the key of their setting.

    `measure` trains the settings that `found` lacks and adds their figures to it.
    """

    def __init__(
        self,
        name: str,
        found: Mapping[str, Sequence[float | None]],
        measure: Callable[[list[Setting]], None],
        *,
        quick: bool = False,
    ) -> None:
        self.name, self.data, self.found, self.measure = name, DATA[name], found, measure
        self.kinds, self.quick = self.data.kinds, quick
        self.seeds, self.tuning_seeds = self.data.seeds, self.data.tuning_seeds
        self.epochs = self.data.epochs
        if quick:
            self.seeds, self.tuning_seeds, self.epochs = 2, 1, max(1, self.epochs // 6)
        rows = [row for row in ROWS if row.method not in self.data.left_out]
        self.rows = [*rows, *MORE_ROWS.get(name, ())]
        self.rates: dict[FeatureKind, float] = {}  # tuned
        self.weights: dict[Pair, float] = {}  # tuned
        self.tried: dict[Pair, dict[float, float]] = {}  # accuracies on the tuning part by weight
        # Of the sweep: kinds of features with the rows of a line.
        self.sweep: list[tuple[FeatureKind, list[Row]]] = []
        if name == SWEEP_DATA:
            scales, sizes = (SCALES[::4], BATCH_SIZES[1:]) if quick else (SCALES, BATCH_SIZES)
            for kind, scale, size in product(KINDS[:2], scales, sizes):
                line = [row._replace(scale=scale, batch_size=size) for row in SWEEP_ROWS]
                self.sweep.append((kind, line))

    def run(self) -> None:
        """Tunes, and trains what is reported."""
        self._tune_rates()
        self._tune_weights()
        reported = [*product(self.kinds, self.rows)]
        reported += [(kind, row) for kind, line in self.sweep for row in line]
        self.measure([setting for one in reported for setting in self.settings(*one)])

    def settings(self, kind: FeatureKind, row: Row) -> list[Setting]:
        """The reported trainings of a row."""
        weight = self.weights[kind, row.method] if row.tuned else row.weight or 0.0
        seeds = self.seeds if row.batch_size is None else min(self.seeds, SWEEP_SEEDS)
        size = row.batch_size or self.data.batch_size
        run = (self.name, kind, row.method, weight, self.rates[kind])
        return [Setting(*run, seed, self.epochs, size, scale=row.scale) for seed in range(seeds)]

    def figures(self, kind: FeatureKind, row: Row) -> dict[int, Figures]:
        """The figures of a row by seed, as far as they were measured."""
        return {
            setting.seed: dict(zip(FIGURES, self.found[setting.key()], strict=False))
            for setting in self.settings(kind, row)
            if setting.key() in self.found
        }

    def accuracies(self, kind: FeatureKind, row: Row) -> list[float]:
        """Of a row by seed."""
        return [figures["accuracy"] or 0.0 for figures in self.figures(kind, row).values()]

    def difference(self, kind: FeatureKind, row: Row, other: Row) -> Interval | None:
        """Of accuracies, paired by seed; None with less than two pairs."""
        first, second = self.figures(kind, row), self.figures(kind, other)
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < 2:
            return None
        pairs = ([found[seed]["accuracy"] or 0.0 for seed in seeds] for found in (first, second))
        return paired_interval(*pairs)

    def _tune(self, tried: Mapping[Any, tuple[FeatureKind, str, float, float]]) -> dict[Any, float]:
        """Mean accuracies on the tuning part, by kind, method, weight and rate."""
        # Other seeds than the reported ones, whose test part may hold the part to tune on.
        seeds = range(100, 100 + self.tuning_seeds)
        size = self.data.batch_size
        settings = {
            key: [Setting(self.name, *run, seed, self.epochs, size, tuning=True) for seed in seeds]
            for key, run in tried.items()
        }
        self.measure([setting for group in settings.values() for setting in group])
        return {
            key: fmean(self.found[setting.key()][0] or 0.0 for setting in group)
            for key, group in settings.items()
        }

    def _tune_rates(self) -> None:
        """Softmax loss alone chooses the network's rate, for all methods."""
        pairs = [*product(self.kinds, self.data.rates)]
        if len(self.data.rates) == 1:
            self.rates = dict(pairs)
            return
        scores = self._tune({(kind, rate): (kind, "softmax", 0.0, rate) for kind, rate in pairs})
        for kind in self.kinds:
            self.rates[kind] = max(self.data.rates, key=lambda rate: scores[kind, rate])

    def _tune_weights(self) -> None:
        """Each range of weights is extended while its best is the first or last."""
        methods = dict.fromkeys(row.method for row in self.rows if METHODS[row.method].start)
        ranges = {pair: METHODS[pair[1]].start for pair in product(self.kinds, methods)}
        grown: dict[Pair, tuple[float, ...]] = {}
        while True:
            tried = [(pair, weight) for pair, weights in ranges.items() for weight in weights]
            scores = self._tune(
                {(pair, weight): (*pair, weight, self.rates[pair[0]]) for pair, weight in tried}
            )
            for pair, weights in ranges.items():
                self.tried[pair] = {weight: scores[pair, weight] for weight in weights}
                best = self.weights[pair] = max(weights, key=self.tried[pair].__getitem__)
                candidates = METHODS[pair[1]].candidates
                first, last = candidates.index(weights[0]), candidates.index(weights[-1])
                first -= best == weights[0] and first > 0
                last += best == weights[-1] and last + 1 < len(candidates)
                grown[pair] = candidates[first : last + 1]
            if grown == ranges or self.quick:
                return
            ranges = dict(grown)


def chosen_row(studies: Sequence[Study]) -> Row:
    """The simplex form at the one weight with the best mean accuracy on the tuning parts."""
    tried = [one.tried[kind, "simplex"] for one in studies for kind in one.kinds]
    return max(SIMPLEX, key=lambda row: fmean(scores[row.weight or 0.0] for scores in tried))
