"""Which trainings there are, what is chosen on the tuning parts, and what the figures decide."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean, stdev
from typing import Any, NamedTuple

from benchmarks.quality.data import DATA
from benchmarks.quality.methods import METHODS, PAPER_WEIGHT, STARTS
from benchmarks.quality.runs import FIGURES, Figures, Setting
from benchmarks.quality.statistics import Interval, paired
from benchmarks.samples import FeatureKind

Measure = Callable[[Iterable[Setting]], None]


class Row(NamedTuple):
    """A line of a table: a method with its tuned weight, or with the one given."""

    method: str
    weight: float | None = None

    @property
    def title(self) -> str:
        return METHODS[self.method].title

    @property
    def tuned(self) -> bool:
        return self.weight is None and bool(METHODS[self.method].start)


SOFTMAX, CENTER, PAPER = Row("softmax"), Row("center"), Row("paper", PAPER_WEIGHT)
FREE, SQUARE = (tuple(Row(method, weight) for weight in STARTS) for method in ("free", "square"))
ROWS = (
    SOFTMAX,
    CENTER,
    Row("island"),
    Row("triplet"),
    Row("cosface"),
    PAPER,
    Row("paper"),
    *FREE,
    Row("free"),
    *SQUARE,
    Row("square"),
    Row("balanced"),
)
# Where they tell why.
MORE_ROWS = {
    "digits": (Row("norm"),),
    "few": (Row("norm"), Row("gradient")),
    "text": (Row("norm"),),
}
# The norm sweep: data, scales of the features, sizes of the batches, seeds.
SWEEP_DATA, SWEEP_SEEDS = "digits", 5
SCALES, BATCH_SIZES = (0.01, 0.1, 1.0, 10.0, 100.0), (16, 256)
SWEEP_KINDS: tuple[FeatureKind, ...] = ("signed", "non-negative")
SWEEP_ROWS = (SOFTMAX, PAPER, FREE[1], SQUARE[1])


class Study:
    """The trainings of one data set.

    Args:
        name: of the data set.
        found: figures by the key of their setting; `measure` adds to them.
        measure: trains what `found` lacks.
        quick: two seeds, a few samples and epochs.
    """

    def __init__(
        self,
        name: str,
        found: Mapping[str, Sequence[float | None]],
        measure: Measure,
        *,
        quick: bool = False,
    ) -> None:
        self.name, self.data, self.found, self.measure = name, DATA[name], found, measure
        self.quick = quick
        self.seeds, self.tuning_seeds = self.data.seeds, self.data.tuning_seeds
        self.epochs = self.data.epochs
        if quick:
            self.seeds, self.tuning_seeds, self.epochs = 2, 1, max(1, self.epochs // 6)
        self.rates: dict[FeatureKind, float] = {}
        self.weights: dict[tuple[FeatureKind, str], float] = {}
        # Accuracies on the tuning part by weight.
        self.tried: dict[tuple[FeatureKind, str], dict[float, float]] = {}

    @property
    def kinds(self) -> Sequence[FeatureKind]:
        return self.data.kinds

    @property
    def rows(self) -> Sequence[Row]:
        rows = [row for row in ROWS if row.method not in self.data.left_out]
        return [*rows, *MORE_ROWS.get(self.name, ())]

    def run(self) -> None:
        """Tunes, and trains what is reported."""
        self._tune_rates()
        self._tune_weights()
        reported = [self.settings(kind, row) for kind, row in product(self.kinds, self.rows)]
        self.measure(setting for settings in reported for setting in settings)
        self.measure(
            setting for place in self.sweep_places() for setting in self.sweep_settings(*place)
        )

    def settings(self, kind: FeatureKind, row: Row) -> list[Setting]:
        """One for each seed."""
        weight = self.weights[kind, row.method] if row.tuned else row.weight or 0.0
        return [self._setting(kind, row.method, weight, seed) for seed in range(self.seeds)]

    def figures(self, kind: FeatureKind, row: Row) -> dict[int, Figures]:
        """Of a line of the table, by seed; of a run that was interrupted, those that are there."""
        return {
            setting.seed: dict(zip(FIGURES, self.found[setting.key()], strict=True))
            for setting in self.settings(kind, row)
            if setting.key() in self.found
        }

    def difference(self, kind: FeatureKind, row: Row, other: Row) -> Interval | None:
        """Of accuracies, paired by seed; None where two pairs are not there."""
        first, second = (self.figures(kind, one) for one in (row, other))
        seeds = sorted(first.keys() & second.keys())
        if len(seeds) < 2:
            return None
        ours, theirs = (
            [found[seed]["accuracy"] or 0.0 for seed in seeds] for found in (first, second)
        )
        return paired(ours, theirs)

    def sweep_places(self) -> list[tuple[FeatureKind, float, int, Row]]:
        if self.name != SWEEP_DATA:
            return []
        sizes, scales = (BATCH_SIZES[-1:], SCALES[::4]) if self.quick else (BATCH_SIZES, SCALES)
        kinds = [kind for kind in SWEEP_KINDS if kind in self.kinds]
        return list(product(kinds, scales, sizes, SWEEP_ROWS))

    def sweep_settings(
        self, kind: FeatureKind, scale: float, batch_size: int, row: Row
    ) -> list[Setting]:
        """One for each seed, at a scale of the features and a size of the batches."""
        seeds = range(min(self.seeds, SWEEP_SEEDS))
        return [
            self._setting(
                kind,
                row.method,
                row.weight or 0.0,
                seed,
                scale=scale,
                batch_size=batch_size,
                brief=True,
            )
            for seed in seeds
        ]

    def sweep(self, kind: FeatureKind, scale: float, batch_size: int, row: Row) -> list[float]:
        """Accuracies there."""
        settings = self.sweep_settings(kind, scale, batch_size, row)
        return [self._accuracy([setting]) for setting in settings]

    def _setting(
        self, kind: FeatureKind, method: str, weight: float, seed: int, **changes: Any
    ) -> Setting:
        values: dict[str, Any] = {
            "rate": self.rates.get(kind),
            "epochs": self.epochs,
            "batch_size": self.data.batch_size,
            **changes,
        }
        return Setting(self.name, kind, method, weight, seed=seed, **values)

    def _candidate(
        self, kind: FeatureKind, method: str, weight: float, **changes: Any
    ) -> list[Setting]:
        # Seeds that no reported run has: the part to tune on may be reported by another seed.
        seeds = range(100, 100 + self.tuning_seeds)
        return [
            self._setting(kind, method, weight, seed, tuning=True, brief=True, **changes)
            for seed in seeds
        ]

    def _accuracy(self, settings: Iterable[Setting]) -> float:
        return fmean(self.found[setting.key()][0] or 0.0 for setting in settings)

    def _tune_rates(self) -> None:
        """Softmax loss alone chooses the network's rate for all methods."""
        if len(self.data.rates) == 1:
            self.rates = dict.fromkeys(self.kinds, self.data.rates[0])
            return
        tried = {
            (kind, rate): self._candidate(kind, "softmax", 0.0, rate=rate)
            for kind, rate in product(self.kinds, self.data.rates)
        }
        self.measure(setting for settings in tried.values() for setting in settings)
        for kind in self.kinds:
            scores = {rate: self._accuracy(tried[kind, rate]) for rate in self.data.rates}
            self.rates[kind] = max(scores, key=scores.__getitem__)

    def _tune_weights(self) -> None:
        """Each method its weight: a range is extended as long as its best is the first or last."""
        methods = dict.fromkeys(row.method for row in self.rows if METHODS[row.method].start)
        ranges = {
            (kind, method): METHODS[method].start for kind, method in product(self.kinds, methods)
        }
        while True:
            tried = {
                (place, weight): self._candidate(*place, weight)
                for place, weights in ranges.items()
                for weight in weights
            }
            self.measure(setting for settings in tried.values() for setting in settings)
            grown = {}
            for place, weights in ranges.items():
                scores = {weight: self._accuracy(tried[place, weight]) for weight in weights}
                best = max(scores, key=scores.__getitem__)
                self.tried[place], self.weights[place] = scores, best
                ladder = METHODS[place[1]].ladder
                first, last = ladder.index(weights[0]), ladder.index(weights[-1])
                first -= best == weights[0] and first > 0
                last += best == weights[-1] and last + 1 < len(ladder)
                grown[place] = ladder[first : last + 1]
            if grown == ranges or self.quick:
                return
            ranges = grown


def default_weight(studies: Sequence[Study]) -> float:
    """The one weight of both forms with the best mean accuracy on the tuning parts."""
    tried = [
        study.tried[kind, method]
        for study in studies
        for kind in study.kinds
        for method in ("free", "square")
    ]
    return max(STARTS, key=lambda weight: fmean(scores[weight] for scores in tried))


class Verdict(NamedTuple):
    """What the rule for the defaults found."""

    worse: list[str]  # places where the interval beside the lesser form is below zero
    better: list[str]  # places where that beside softmax loss is above zero
    fallen: list[str]  # cells of the norm sweep two deviations below softmax loss

    @property
    def holds(self) -> bool:
        return not self.worse and len(self.better) >= 2 and not self.fallen


def judge(studies: Sequence[Study], row: Row, lesser: Row) -> Verdict:
    """The rule, for a form of the loss beside a lesser one."""
    worse, better, fallen = [], [], []
    for study in studies:
        for kind in study.kinds:
            place = f"{study.name}, {kind}"
            beside_lesser = study.difference(kind, row, lesser)
            beside_softmax = study.difference(kind, row, SOFTMAX)
            if beside_lesser is not None and beside_lesser.high < 0:
                worse.append(place)
            if beside_softmax is not None and beside_softmax.low > 0:
                better.append(place)
        cells = dict.fromkeys(place[:3] for place in study.sweep_places())
        for kind, scale, size in cells:
            swept = next(one for one in SWEEP_ROWS if one.method == row.method)
            ours, softmax = (study.sweep(kind, scale, size, one) for one in (swept, SOFTMAX))
            if fmean(ours) < fmean(softmax) - 2 * max(stdev(softmax), stdev(ours)):
                fallen.append(f"{kind}, scale {scale:g}, batches of {size}")
    return Verdict(worse, better, fallen)
