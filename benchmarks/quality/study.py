"""Which runs there are, and which of them belong to what is shown."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.quality.methods import METHODS
from benchmarks.quality.settings import (
    BATCH_SIZE,
    FEATURE_DIM,
    KINDS,
    PAPER_WEIGHT,
    RATES,
    DataName,
    Scale,
    Setting,
)
from benchmarks.training import FeatureKind

Record = Mapping[str, Any]
Measure = Callable[[Iterable[Setting], bool], Mapping[Setting, Record]]


class Row(NamedTuple):
    """A line of the main table: a method with its tuned strength, or with the one given."""

    title: str
    method: str
    strength: float | None = None


ROWS = (
    Row("softmax loss", "softmax"),
    Row("+ center loss", "center"),
    Row("+ island loss", "island"),
    Row("+ triplet loss, batch-hard", "triplet"),
    Row("CosFace head", "cosface"),
    Row("+ separate, defaults", "separate", PAPER_WEIGHT),
    Row("+ separate, weight tuned", "separate"),
    Row('+ separate, `"gradient"`, weight tuned', "gradient"),
    Row('+ separate, `"gradient"`, class weights', "balanced", PAPER_WEIGHT),
    Row('+ separate, `"gradient"`, class weights, half of Eq. 3', "balanced, inter x 0.5", 2.0),
    Row("+ separate, U(0, 1), `center_lr=0.01`", "slow", PAPER_WEIGHT),
)
SOFTMAX, DEFAULTS, BALANCED, SLOW = ROWS[0], ROWS[5], ROWS[8], ROWS[-1]
SEPARATE = ROWS[5:]
PICTURED = (SOFTMAX, DEFAULTS, BALANCED)
BATCH_METHODS = ("softmax", "separate", "gradient", "balanced")
OTHER_METHODS = tuple(name for name in METHODS if "," in name)  # centers moved otherwise
SIZE_METHODS = ("softmax", "separate")


@dataclass
class Study:
    """What was chosen on the tuning part, and every run's figures."""

    scale: Scale
    data: tuple[DataName, ...]
    measure: Measure
    class_names: dict[DataName, list[str]]
    rates: dict[tuple[DataName, FeatureKind], float] = field(default_factory=dict)
    strengths: dict[tuple[DataName, FeatureKind, str], float] = field(default_factory=dict)
    found: dict[Setting, Record] = field(default_factory=dict)

    def settings(
        self, data: DataName, kind: FeatureKind, method: str, seeds: int, **changes: Any
    ) -> list[Setting]:
        """One for each seed: the paper's weight and the usual, but for the changes."""
        usual: dict[str, Any] = {
            "strength": PAPER_WEIGHT,
            "rate": self.rates.get((data, kind)),
            "epochs": self.scale.epochs[data],
            "batch_size": BATCH_SIZE[data],
            "feature_dim": FEATURE_DIM[data],
        }
        if method == "softmax":
            changes["strength"] = 0.0
        usual |= changes
        return [Setting(data, kind, method, seed=seed, **usual) for seed in range(seeds)]

    def records(
        self, data: DataName, kind: FeatureKind, method: str, seeds: int, **changes: Any
    ) -> list[Record]:
        """Figures of what `settings` gives."""
        return [self.found[one] for one in self.settings(data, kind, method, seeds, **changes)]

    def row_settings(self, data: DataName, kind: FeatureKind, row: Row) -> list[Setting]:
        """One for each seed of the main table."""
        strength = row.strength
        if strength is None:
            strength = self.strengths.get((data, kind, row.method), 0.0)
        seeds = self.scale.seeds[data]
        return self.settings(data, kind, row.method, seeds, strength=strength)

    def row(self, data: DataName, kind: FeatureKind, row: Row) -> list[Record]:
        """Figures of a line of the main table, for all seeds."""
        return [self.found[one] for one in self.row_settings(data, kind, row)]

    def tune(self) -> None:
        """Softmax loss chooses the rate for all, then each method its weight or margin."""
        places = list(product(self.data, KINDS))
        candidates = {
            (data, kind, rate): self.tuning(data, kind, "softmax", rate=rate)
            for (data, kind), rate in product(places, RATES)
        }
        self._run(candidates.values())
        for data, kind in places:
            self.rates[data, kind] = max(
                RATES, key=lambda rate: self.accuracy(candidates[data, kind, rate])
            )
        tuned = [name for name, method in METHODS.items() if method.strengths]
        choices = {
            (data, kind, name, strength): self.tuning(data, kind, name, strength=strength)
            for (data, kind), name in product(places, tuned)
            for strength in METHODS[name].strengths
        }
        self._run(choices.values())
        for (data, kind), name in product(places, tuned):
            self.strengths[data, kind, name] = max(
                METHODS[name].strengths,
                key=lambda strength: self.accuracy(choices[data, kind, name, strength]),
            )

    def tuning(
        self, data: DataName, kind: FeatureKind, method: str, **changes: Any
    ) -> list[Setting]:
        """Runs of a candidate, measured on the tuning part."""
        seeds = self.scale.tuning_seeds[data]
        return self.settings(data, kind, method, seeds, tuning=True, **changes)

    def accuracy(self, settings: Iterable[Setting]) -> float:
        """The mean over runs that were measured."""
        return fmean(self.found[setting]["accuracy"] for setting in settings)

    def run(self) -> None:
        """All that is reported."""
        self._run(self._main(), detailed=True)
        self._run([*self._weights(), *self._sizes(), *self._batches()])

    def _run(self, groups: Iterable[list[Setting]], *, detailed: bool = False) -> None:
        settings = dict.fromkeys(setting for group in groups for setting in group)
        missing = [setting for setting in settings if setting not in self.found]
        self.found |= self.measure(missing, detailed)

    def _main(self) -> Iterator[list[Setting]]:
        for data, kind, row in product(self.data, KINDS, ROWS):
            yield self.row_settings(data, kind, row)

    def _weights(self) -> Iterator[list[Setting]]:
        for data, kind, weight in product(self.data, KINDS, self.scale.weights):
            seeds = self.scale.sweep_seeds[data]
            yield self.settings(data, kind, "separate", seeds, strength=weight)

    def _sizes(self) -> Iterator[list[Setting]]:
        if "faces" in self.data:
            for kind, method, dim in product(KINDS, SIZE_METHODS, self.scale.feature_dims):
                seeds = self.scale.sweep_seeds["faces"]
                yield self.settings("faces", kind, method, seeds, feature_dim=dim)

    def _batches(self) -> Iterator[list[Setting]]:
        if "faces" in self.data:
            for kind, (method, size) in product(KINDS, self.batch_places()):
                seeds = self.batch_seeds(method)
                yield self.settings("faces", kind, method, seeds, batch_size=size)

    def batch_places(self) -> list[tuple[str, int]]:
        """Methods and batch sizes where it is shown how centers settle."""
        usual = BATCH_SIZE["faces"]
        sizes = sorted({*self.scale.batch_sizes, usual})
        return [
            *((method, size) for size in sizes for method in BATCH_METHODS),
            *((method, usual) for method in OTHER_METHODS),
        ]

    def batch_seeds(self, method: str) -> int:
        """Of such a place."""
        return (
            self.scale.batch_seeds if method in BATCH_METHODS else self.scale.sweep_seeds["faces"]
        )

    def pictured(self) -> list[Setting]:
        """Runs whose feature spaces are drawn."""
        return [
            self.row_settings(data, kind, row)[0]
            for data, kind, row in product(self.data, KINDS, PICTURED)
        ]
