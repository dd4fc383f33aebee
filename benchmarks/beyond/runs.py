"""One training, from its setting to its figures."""

import math
import time
from typing import Any, NamedTuple

import torch

from benchmarks import training
from benchmarks.beyond.data import BATCH_SIZE, FEATURE_DIM, DataName, Source, load, network
from benchmarks.beyond.figures import figures
from benchmarks.beyond.losses import Candidate
from benchmarks.beyond.methods import METHODS
from benchmarks.faces import mirrored
from benchmarks.quality.methods import CosineHead, Problem
from benchmarks.quality.runs import objective, optimizers
from benchmarks.training import FeatureKind


class Setting(NamedTuple):
    """What decides the outcome; `strength` is the weight of the method's loss, or its margin."""

    data: DataName
    kind: FeatureKind
    method: str
    strength: float
    rate: float  # of the network, the highest of its schedule
    epochs: int
    seed: int
    tuning: bool = False  # measured on the part to tune on, not on the one to report

    def key(self) -> str:
        """A name that says it all."""
        return "/".join(map(str, self[:-1])) + ("/tuning" if self.tuning else "")


def record(setting: Setting, source: Source) -> dict[str, Any]:
    """Trains once, on one thread; of a run to tune by only the accuracy is kept."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    data = load(setting.data, source, setting.seed)
    classes, samples = len(data.class_names), len(data.training.labels)
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    model = network(setting.data, setting.kind, classes)
    counts = data.training.labels.bincount(minlength=classes)
    criterion = method.build(Problem(counts, FEATURE_DIM, setting.strength))
    if method.is_head:
        model.classifier = CosineHead(criterion)
    batch_size = BATCH_SIZE[setting.data]
    total = setting.epochs * math.ceil(samples / batch_size)
    moving, schedule = optimizers(model, criterion, method, setting.rate, total)
    steps = training.train(
        model,
        data.training,
        objective(criterion, method, setting.strength),
        moving,
        epochs=setting.epochs,
        batch_size=batch_size,
        seed=setting.seed,
        schedule=schedule,
        augment=mirrored if setting.data == "faces" else None,
    )
    for _ in steps:
        pass
    found: dict[str, Any]
    if setting.tuning:
        accuracy = training.evaluate(model, data.tuning, None, classes).figures.accuracy
        found = {"accuracy": round(accuracy, 3)}
    else:
        centers = getattr(criterion, "centers", None)
        is_centred = isinstance(criterion, Candidate) and criterion.centred
        found = figures(model, data, None if is_centred else centers)
    return found | {"seconds": round(time.perf_counter() - began, 1)}
