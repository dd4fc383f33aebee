"""One training, from its setting to its figures."""

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import digits, faces, training
from benchmarks.faces import Parts
from benchmarks.quality.methods import METHODS, CosineHead, Method, Problem
from benchmarks.quality.settings import DataName, Setting
from benchmarks.training import Loss, Split, Trained
from separate_loss import metrics

LABELS_PER_CLASS = 10  # of the digits
POINTS = 10  # of a run's course, about
COURSE = ("epoch", "agreement")


class Source(NamedTuple):
    """Where faces are, and how many of them to train on."""

    path: Path | None
    most: int


@lru_cache(maxsize=1)
def _faces(source: Source) -> Parts:
    if source.path is None:
        raise ValueError("no path of faces")
    return faces.parts(faces.load(source.path), source.most)


@lru_cache(maxsize=1)
def _digits() -> tuple[Split, Split]:
    return digits.load_split(0)


def parts(data: DataName, source: Source, seed: int) -> Parts:
    """Training, tuning and test images; of the digits, the seed draws the few to train on."""
    if data == "faces":
        return _faces(source)
    half, test = _digits()
    chosen, others = train_test_split(
        torch.arange(len(half.labels)),
        train_size=LABELS_PER_CLASS * digits.NUM_CLASSES,
        random_state=seed,
        stratify=half.labels,
    )
    few, rest = (Split(half.images[rows], half.labels[rows]) for rows in (chosen, others))
    return Parts(few, rest, test, [str(digit) for digit in range(digits.NUM_CLASSES)])


def run(setting: Setting, source: Source) -> tuple[dict[str, Any], Trained]:
    """Trains once, on one thread; gives the figures as JSON takes them, and what was trained."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    data = parts(setting.data, source, setting.seed)
    seen, measured = data.training, data.tuning if setting.tuning else data.test
    classes = len(data.class_names)
    method = METHODS[setting.method]
    torch.manual_seed(setting.seed)
    model = _network(setting, classes)
    counts = seen.labels.bincount(minlength=classes)
    criterion = method.build(Problem(counts, setting.feature_dim, setting.strength))
    if method.is_head:
        model.classifier = CosineHead(criterion)
    total = setting.epochs * math.ceil(len(seen.labels) / setting.batch_size)
    moving, schedule = optimizers(model, criterion, method, setting.rate, total)
    steps = training.train(
        model,
        seen,
        objective(criterion, method, setting.strength),
        moving,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        seed=setting.seed,
        schedule=schedule,
        augment=faces.mirrored if setting.data == "faces" else None,
    )
    course: dict[str, list[Any]] = {}
    every = max(1, setting.epochs // POINTS)
    for epoch in steps:
        if (epoch + 1) % every and epoch + 1 < setting.epochs:
            continue
        trained = training.evaluate(model, measured, _centers(criterion), classes)
        for name, value in {"epoch": epoch + 1, **_figures(trained)}.items():
            course.setdefault(name, []).append(value)
    record = {
        **{name: values[-1] for name, values in course.items() if name != "epoch"},
        "seconds": round(time.perf_counter() - began, 1),
        "agreements": _agreements(trained),
        "course": {name: course[name] for name in COURSE},
        "confusion": _confusion(measured.labels, trained.predicted, classes),
    }
    return record, trained


def record(setting: Setting, source: Source, detailed: bool) -> dict[str, Any]:
    """The figures of a run, for a worker process; in detail also by class and by epoch."""
    found = run(setting, source)[0]
    if not detailed:
        for name in ("agreements", "course", "confusion"):
            del found[name]
    return found


def _network(setting: Setting, classes: int) -> nn.Module:
    if setting.data == "faces":
        return faces.FaceClassifier(setting.kind, setting.feature_dim, classes)
    return digits.DigitClassifier(setting.kind)


def objective(criterion: nn.Module | None, method: Method, strength: float) -> Loss:
    """What is minimised: the head's loss, or softmax loss and the criterion's beside it."""
    if method.is_head and criterion is not None:
        return lambda features, _, labels: criterion(features, labels)
    return training.joint(criterion, strength)


def optimizers(
    model: nn.Module, criterion: nn.Module | None, method: Method, rate: float, total: int
) -> tuple[list[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Adam in one cycle for the network; SGD at a constant rate for centers that have one."""
    extra = [] if criterion is None or method.is_head else list(criterion.parameters())
    inside = extra if method.center_rate is None else []
    adam = torch.optim.AdamW([*model.parameters(), *inside], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, rate, total_steps=total)
    moving: list[torch.optim.Optimizer] = [adam]
    if extra and method.center_rate is not None:
        moving.append(torch.optim.SGD(extra, lr=method.center_rate))
    return moving, schedule


def _centers(criterion: nn.Module | None) -> Tensor | None:
    centers = getattr(criterion, "centers", None)
    return centers if isinstance(centers, Tensor) else None


def _figures(trained: Trained) -> dict[str, float | None]:
    """The paper's Table 1, and what tells why: all None that there is no learned center for."""
    found: dict[str, float | None] = dict(trained.figures._asdict())
    found |= dict.fromkeys(("agreement", "agreement_lowest", "inter_learned", "center_sum"))
    if trained.centers is not None:
        found |= {
            "agreement": trained.figures.agreement,
            "agreement_lowest": min(_agreements(trained)),
            "inter_learned": metrics.inter_class_similarity(trained.centers).item(),
            "center_sum": F.normalize(trained.centers, dim=-1).sum(0).norm().item(),
        }
    return {name: None if value is None else round(value, 4) for name, value in found.items()}


def _agreements(trained: Trained) -> list[float]:
    """Of each class that the measured part has samples of; none without learned centers."""
    if trained.centers is None:
        return []
    means = metrics.class_centers(trained.features, trained.labels, len(trained.centers))
    agreements = metrics.center_agreement(trained.centers, means, reduction="none")
    return [round(agreement, 4) for agreement in agreements.tolist() if not math.isnan(agreement)]


def _confusion(labels: Tensor, predicted: Tensor, classes: int) -> list[list[int]]:
    """Counts, a row for each true class."""
    counts = torch.bincount(labels * classes + predicted, minlength=classes**2)
    rows: list[list[int]] = counts.reshape(classes, classes).tolist()
    return rows
