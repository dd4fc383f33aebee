"""Which trainings there are, what is chosen on the tuning parts, and how the losses compare."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

from benchmarks.data import FeatureKind, Split
from benchmarks.harness import Interval, is_below, paired_interval
from benchmarks.quality.data import DATA, ONE, RATES, SOFTMAX, THREE, Files, Row
from benchmarks.training import FIGURES, METHODS, CosineHead, evaluate, learned_centers, train_steps


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
    tuning: bool = False  # measured on the part to tune on
    scale: float = 1.0  # of the features

    def key(self) -> str:
        """A name that differs between the trainings of a data set."""
        run = f"{self.kind}: {self.method} {self.weight:g}, rate {self.rate:g}, seed {self.seed}"
        scaled = "" if self.scale == 1 else f", scale {self.scale:g}"
        return run + scaled + (", tuning" if self.tuning else "")


def run(
    setting: Setting, files: Files, device: str = "cpu", most: int | None = None
) -> list[float | None]:
    """Trains once, on one thread and at most `most` samples, and returns `FIGURES` in order.

    While tuning, the accuracy alone. All methods start from the same weights under the same seed,
    and see the same batches.
    """
    torch.set_num_threads(1)
    data, method = DATA[setting.data], METHODS[setting.method]
    splits = data.load(files, setting.seed, setting.tuning)
    classes = int(splits[0].labels.max()) + 1
    training, measured = (Split(*(part.to(device) for part in split)) for split in splits)
    if most is not None:
        rows = torch.arange(len(training.labels))[:: -(-len(training.labels) // most)]
        training = Split(*(part[rows] for part in training))
    torch.manual_seed(setting.seed)
    model = data.network(setting.kind, classes).to(device)
    model.scale = setting.scale
    counts = training.labels.bincount(minlength=classes)
    criterion = method.build(counts, model.feature_dim, setting.weight).to(device)
    if method.is_head:
        model.classifier = CosineHead(criterion)
    # A last batch of one sample is left out: it has no variance for BatchNorm1d.
    steps = setting.epochs * -(-(len(training.labels) - 1) // data.batch_size)
    optimizer, schedule = data.optimizer(model, setting.rate, steps)
    optimizers = [optimizer]
    if not method.is_head and list(criterion.parameters()):
        optimizers.append(method.optimizer(criterion.parameters()))
    generator = torch.Generator().manual_seed(setting.seed)
    objective = method.objective(criterion, setting.weight, counts)

    def batches() -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(training.labels), generator=generator)
        for rows in order.split(data.batch_size):
            if len(rows) > 1:
                yield data.augment(training.images[rows], generator), training.labels[rows]

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
    if setting.tuning:
        return [found["accuracy"]]
    found["train_accuracy"] = figures(training)["accuracy"]
    return [found[name] for name in FIGURES]


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
        self.seeds, self.tuning_seeds = self.data.seeds, self.data.tuning_seeds
        self.epochs, self.quick = self.data.epochs, quick
        if quick:
            self.seeds, self.tuning_seeds, self.epochs = 2, 1, max(1, self.epochs // 6)
        self.rates: dict[FeatureKind, float] = {}  # tuned
        self.weights: dict[tuple[FeatureKind, str], float] = {}  # tuned
        # Mean accuracies on the tuning part, of rates (by "rate") and of weights (by method).
        self.tried: dict[tuple[FeatureKind, str], dict[float, float]] = {}

    def run(self) -> None:
        """Tunes the rate with softmax loss alone, then each weight, and trains what is reported."""
        for kind, rows in self.data.rows.items():
            self.rates[kind] = self._tune(kind, "rate", self.data.start, RATES)
            for name in (row.method for row in rows if row.tuned):
                start, candidates = METHODS[name].start, METHODS[name].candidates
                self.weights[kind, name] = self._tune(kind, name, start, candidates)
        reported = [(kind, row) for kind, rows in self.data.rows.items() for row in rows]
        self.measure([setting for one in reported for setting in self.settings(*one)])

    def _tune(
        self, kind: FeatureKind, name: str, start: Sequence[float], candidates: Sequence[float]
    ) -> float:
        """The best candidate; the range is extended while its best is the first or last."""
        if len(start) == 1:
            return start[0]

        def settings(value: float) -> list[Setting]:
            run = ("softmax", 0.0, value) if name == "rate" else (name, value, self.rates[kind])
            seeds = range(100, 100 + self.tuning_seeds)  # other than the reported ones
            return [Setting(self.name, kind, *run, n, self.epochs, tuning=True) for n in seeds]

        tried = self.tried[kind, name] = {}
        wanted = start
        while True:
            self.measure([setting for value in wanted for setting in settings(value)])
            for value in wanted:
                tried[value] = fmean(self.found[one.key()][0] or 0.0 for one in settings(value))
            best = max(tried, key=tried.__getitem__)
            place = candidates.index(best)
            beside = candidates[max(0, place - 1) : place + 2]
            wanted = [value for value in beside if value not in tried]
            if not wanted or self.quick:
                return best

    def settings(self, kind: FeatureKind, row: Row) -> list[Setting]:
        """The reported trainings of a row."""
        weight = self.weights[kind, row.method] if row.tuned else row.weight or 0.0
        run = (self.name, kind, row.method, weight, self.rates[kind])
        return [Setting(*run, seed, self.epochs, scale=row.scale) for seed in range(self.seeds)]

    def figures(self, kind: FeatureKind, row: Row) -> list[dict[str, float | None]]:
        """The figures of a row, a training each."""
        runs = (self.found[setting.key()] for setting in self.settings(kind, row))
        return [dict(zip(FIGURES, run, strict=True)) for run in runs]

    def values(self, kind: FeatureKind, row: Row, figure: str = "accuracy") -> list[float]:
        """One figure of a row by seed."""
        return [figures[figure] or 0.0 for figures in self.figures(kind, row)]

    def difference(
        self, kind: FeatureKind, row: Row, other: Row, figure: str = "accuracy"
    ) -> Interval:
        """Of a figure, paired by seed."""
        return paired_interval(*(self.values(kind, one, figure) for one in (row, other)))


def default_weight(studies: Sequence[Study]) -> tuple[float, str]:
    """The default of `separate_weight`, 1 or 3, by a rule fixed before the runs, and why.

    3, if its mean gain on the tuning parts is larger, in units of softmax loss's deviation; if it
    is below softmax loss nowhere, at a family-wise 5 % (Holm); and not with plain SGD.
    """
    plain, lines = [], []
    for study in studies:
        for kind, rows in study.data.rows.items():
            if study.name == "sgd":
                plain.append((kind, study.difference(kind, THREE, SOFTMAX)[0]))
            elif {SOFTMAX, THREE} <= {*rows}:
                lines.append((study, kind))
    gains = {}
    for row in (ONE, THREE):
        scaled = []
        for study, kind in lines:
            if (kind, "simplex") in study.tried:
                softmax = study.tried[kind, "rate"][study.rates[kind]]
                gain = study.tried[kind, "simplex"][row.weight or 0.0] - softmax
                scaled.append(gain / (stdev(study.values(kind, SOFTMAX)) or 1.0))
        gains[row] = fmean(scaled)
    found = sorted(
        (is_below(study.values(kind, THREE), study.values(kind, SOFTMAX)), study.data.title, kind)
        for study, kind in lines
    )
    below = []
    for rank, (value, title, kind) in enumerate(found):
        if value > 0.05 / (len(found) - rank):
            break
        below.append(f"{title}, {kind}")
    larger = gains[THREE] > gains[ONE]
    weight = 3.0 if larger and not below and all(mean >= 0 for _, mean in plain) else 1.0
    listed = ", ".join(f"{kind} {mean:+.1f}" for kind, mean in plain)
    return weight, (
        f"Mean gain on the tuning parts, in deviations of softmax loss: {gains[ONE]:.2f} at 1, "
        f"{gains[THREE]:.2f} at 3. At 3 below softmax loss (Holm, 5 %, {len(found)} lines): "
        f"{'; '.join(below) or 'nowhere'}. With plain SGD, at 3: {listed or '-'}. "
        f"So the default is {weight:g}."
    )
