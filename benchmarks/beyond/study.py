"""Which runs there are, what was chosen on the tuning parts, and who wins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.beyond.data import DataName
from benchmarks.beyond.methods import FIRST, METHODS, PAPER, PEERS, SINGLE, SOFTMAX, additions
from benchmarks.beyond.runs import Setting
from benchmarks.quality.settings import RATES
from benchmarks.quality.statistics import Interval, paired
from benchmarks.training import FeatureKind

Record = Mapping[str, Any]
Measure = Callable[[Iterable[Setting]], Mapping[Setting, Record]]
Place = tuple[DataName, FeatureKind]


class Scale(NamedTuple):
    """How much is run; each method has the same number of candidates everywhere."""

    faces: int  # to train on, at most
    epochs: dict[DataName, int]
    seeds: dict[DataName, int]
    tuning_seeds: dict[DataName, int]


FULL = Scale(
    faces=4000,
    epochs={"digits": 60, "faces": 6, "stdlib": 10},
    seeds={"digits": 10, "faces": 6, "stdlib": 8},
    tuning_seeds={"digits": 3, "faces": 1, "stdlib": 2},
)
QUICK = Scale(
    faces=1000,
    epochs={"digits": 20, "faces": 2, "stdlib": 5},
    seeds={"digits": 2, "faces": 2, "stdlib": 2},
    tuning_seeds={"digits": 1, "faces": 1, "stdlib": 1},
)

MERITS = {"accuracy": 1, "auroc": 1, "ece": -1}  # and which way is better
GAINS = ("accuracy", "auroc")  # a win is in one of these
ENOUGH = 2  # data sets to win on, of three
FRESH = 100  # the first of the seeds on which the nearest candidate is seen again


@dataclass
class Study:
    """What was chosen, and every run's figures."""

    scale: Scale
    data: tuple[DataName, ...]
    kinds: tuple[FeatureKind, ...]
    measure: Measure
    rates: dict[Place, float] = field(default_factory=dict)
    strengths: dict[tuple[DataName, FeatureKind, str], float] = field(default_factory=dict)
    best: dict[FeatureKind, str] = field(default_factory=dict)
    found: dict[Setting, Record] = field(default_factory=dict)

    def run(self) -> None:
        """Chooses, then measures all that is reported, one kind of features after the other."""
        for kind in self.kinds:
            self._choose_rates(kind)
            self._choose_strengths(kind, [*PEERS, *FIRST])
            self.best[kind] = max(SINGLE, key=lambda name: self._tuned_accuracy(kind, name))
            self._choose_strengths(kind, additions(self.best[kind]))
            places = product(self.data, self.methods(kind))
            self._run(self.settings(data, kind, method) for data, method in places)
            again = product(self.data, (SOFTMAX, PAPER, self.nearest(kind)))
            self._run(self.settings(data, kind, method, fresh=True) for data, method in again)

    def methods(self, kind: FeatureKind) -> list[str]:
        """Those that are reported."""
        return [*PEERS, *self.candidates(kind)]

    def candidates(self, kind: FeatureKind) -> list[str]:
        """Those that may win."""
        return [*FIRST, *additions(self.best[kind])]

    def nearest(self, kind: FeatureKind) -> str:
        """The candidate with the most verdicts for it, less those against it."""

        def balance(method: str) -> int:
            places = product(self.data, (SOFTMAX, PAPER), MERITS)
            return sum(self.clearly(data, kind, method, *other) for data, *other in places)

        return max(self.candidates(kind), key=balance)

    def settings(
        self, data: DataName, kind: FeatureKind, method: str, *, fresh: bool = False
    ) -> list[Setting]:
        """One for each seed that is reported, or twice as many that chose nothing."""
        rate, strength = self.rates[data, kind], self.strengths[data, kind, method]
        epochs, count = self.scale.epochs[data], self.scale.seeds[data]
        seeds = range(FRESH, FRESH + 2 * count) if fresh else range(count)
        return [Setting(data, kind, method, strength, rate, epochs, seed) for seed in seeds]

    def tuning(
        self, data: DataName, kind: FeatureKind, method: str, strength: float, rate: float
    ) -> list[Setting]:
        """One for each seed to tune with."""
        epochs, seeds = self.scale.epochs[data], self.scale.tuning_seeds[data]
        return [
            Setting(data, kind, method, strength, rate, epochs, seed, tuning=True)
            for seed in range(seeds)
        ]

    def tuned(self, data: DataName, kind: FeatureKind, method: str) -> dict[float, float]:
        """Accuracy of each candidate on the tuning part: softmax loss's rates, others' weights."""
        if method == SOFTMAX:
            groups = {rate: self.tuning(data, kind, method, 0.0, rate) for rate in RATES}
        else:
            rate = self.rates[data, kind]
            groups = {
                strength: self.tuning(data, kind, method, strength, rate)
                for strength in METHODS[method].strengths
            }
        return {
            value: fmean(self.found[one]["accuracy"] for one in group)
            for value, group in groups.items()
        }

    def records(
        self, data: DataName, kind: FeatureKind, method: str, *, fresh: bool = False
    ) -> list[Record]:
        """Figures of each seed."""
        return [self.found[one] for one in self.settings(data, kind, method, fresh=fresh)]

    def compare(
        self,
        data: DataName,
        kind: FeatureKind,
        method: str,
        other: str,
        name: str,
        level: float = 0.95,
        *,
        fresh: bool = False,
    ) -> Interval:
        """The paired difference of a figure."""
        first, second = (
            [figure(one, name) for one in self.records(data, kind, each, fresh=fresh)]
            for each in (method, other)
        )
        return paired(first, second, level)

    def level(self, kind: FeatureKind) -> float:
        """Bonferroni's, for the number of candidates."""
        return 1 - 0.05 / len(self.candidates(kind))

    def clearly(self, data: DataName, kind: FeatureKind, method: str, other: str, name: str) -> int:
        """1 for clearly better than the other, -1 for clearly worse, else 0."""
        interval = self.compare(data, kind, method, other, name, self.level(kind))
        return MERITS[name] * (int(interval.low > 0) - int(interval.high < 0))

    def wins(self, kind: FeatureKind, method: str) -> bool:
        """By the rule that stood before the runs; see docs/beyond.md."""
        # On each data set the worse of both verdicts: a gain is one beside both.
        verdicts = {
            name: [
                min(self.clearly(data, kind, method, one, name) for one in (SOFTMAX, PAPER))
                for data in self.data
            ]
            for name in MERITS
        }
        gains = max(verdicts[name].count(1) for name in GAINS)
        return gains >= ENOUGH and min(map(min, verdicts.values())) >= 0

    def _choose_rates(self, kind: FeatureKind) -> None:
        self._run(
            self.tuning(data, kind, SOFTMAX, 0.0, rate) for data, rate in product(self.data, RATES)
        )
        for data in self.data:
            accuracies = self.tuned(data, kind, SOFTMAX)
            self.rates[data, kind] = max(accuracies, key=accuracies.__getitem__)
            self.strengths[data, kind, SOFTMAX] = 0.0

    def _choose_strengths(self, kind: FeatureKind, methods: Sequence[str]) -> None:
        places = [
            (data, method) for data, method in product(self.data, methods) if method != SOFTMAX
        ]
        self._run(
            self.tuning(data, kind, method, strength, self.rates[data, kind])
            for data, method in places
            for strength in METHODS[method].strengths
        )
        for data, method in places:
            accuracies = self.tuned(data, kind, method)
            self.strengths[data, kind, method] = max(accuracies, key=accuracies.__getitem__)

    def _tuned_accuracy(self, kind: FeatureKind, method: str) -> float:
        """Of the chosen weight, mean over data sets."""
        return fmean(max(self.tuned(data, kind, method).values()) for data in self.data)

    def _run(self, groups: Iterable[list[Setting]]) -> None:
        settings = dict.fromkeys(setting for group in groups for setting in group)
        self.found |= self.measure([one for one in settings if one not in self.found])


def figure(record: Record, name: str) -> float:
    """A figure of a run; `auroc` is the mean over what was held out."""
    if name != "auroc":
        return float(record[name])
    return fmean(value for key, value in record.items() if key.startswith("auroc "))
