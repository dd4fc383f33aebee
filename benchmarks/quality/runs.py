"""One training, from its setting to its figures."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import training
from benchmarks.quality.data import DATA, DataSet, Place
from benchmarks.quality.methods import METHODS, CosineHead, Method, Problem
from benchmarks.training import FeatureKind, Loss, Split
from separate_loss import metrics

BINS = 15  # of the calibration error
# In the order in which they are stored; percentages, mean cosines, and the norm.
FIGURES = (
    "accuracy",
    "recall",  # mean over the classes
    "calibration",  # error
    "intra",  # of features to their class means
    "inter",  # between class means
    "closest",  # two of these
    "norm",
    "agreement",  # of learned centers with class means
    "agreement_lowest",  # of any class
    "nearest",  # accuracy of the nearest learned center
    "train_accuracy",
)
Figures = Mapping[str, float | None]


@dataclass(frozen=True)
class Setting:
    """What decides the outcome; `weight` is that of the method's loss, or its margin."""

    data: str
    kind: FeatureKind
    method: str
    weight: float
    rate: float  # of the network, the highest of its schedule
    seed: int
    epochs: int
    batch_size: int
    tuning: bool = False  # measured on the part to tune on, not on the one to report
    scale: float = 1.0  # of the features
    brief: bool = False  # of its figures the accuracy is wanted alone

    def key(self) -> str:
        """A name that says it all, but for how much is wanted."""
        words = [
            f"{self.data}, {self.kind}: {self.method} {self.weight:g}",
            f"rate {self.rate:g}, {self.epochs} epochs of {self.batch_size}, seed {self.seed}",
        ]
        if self.scale != 1:
            words.append(f"scale {self.scale:g}")
        return ", ".join([*words, *(["tuning"] if self.tuning else [])])


def run(setting: Setting, place: Place, device: str, quick: bool = False) -> list[float | None]:
    """Trains once, on one thread; gives the figures in their order, as many as are wanted."""
    torch.set_num_threads(1)
    data, method = DATA[setting.data], METHODS[setting.method]
    sides = data.sides(place, setting.seed, setting.tuning)
    seen, measured = (Split(*(part.to(device) for part in side)) for side in sides)
    if quick:
        seen = Split(*(part[:400] for part in seen))
    classes = data.classes(place)
    torch.manual_seed(setting.seed)
    model = data.network(place, setting.kind, classes, setting.scale).to(device)
    counts = seen.labels.bincount(minlength=classes).to(device)
    criterion = method.build(Problem(counts, data.feature_dim, setting.weight))
    if criterion is not None:
        criterion.to(device)
    if method.is_head:
        model.classifier = CosineHead(criterion)
    steps = setting.epochs * math.ceil(len(seen.labels) / setting.batch_size)
    moving, schedule = optimizers(model, criterion, data, method, setting.rate, steps)
    for _ in training.train(
        model,
        seen,
        objective(criterion, method, setting.weight),
        moving,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        seed=setting.seed,
        schedule=schedule,
        augment=data.augment,
    ):
        pass
    centers = getattr(criterion, "centers", None)
    found = figures(model, measured, centers, classes)
    if setting.brief:
        return [found["accuracy"]]
    trained = figures(model, seen, centers, classes)
    return [{**found, "train_accuracy": trained["accuracy"]}[name] for name in FIGURES]


def objective(criterion: nn.Module | None, method: Method, weight: float) -> Loss:
    """What is minimised: the head's loss, or softmax loss and the criterion's beside it."""
    if method.is_head and criterion is not None:
        return lambda features, _, labels: criterion(features, labels)
    return training.joint(criterion, weight)


def optimizers(
    model: nn.Module,
    criterion: nn.Module | None,
    data: DataSet,
    method: Method,
    rate: float,
    steps: int,
) -> tuple[list[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """AdamW in one cycle or SGD along a cosine for the network; SGD for centers that are learned."""
    schedule: torch.optim.lr_scheduler.LRScheduler
    of_model: torch.optim.Optimizer
    if data.optimizer == "adam":
        of_model = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(of_model, rate, total_steps=steps)
    else:
        of_model = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(of_model, steps)
    centers = [] if criterion is None or method.is_head else list(criterion.parameters())
    if centers:
        return [of_model, torch.optim.SGD(centers, lr=method.center_rate)], schedule
    return [of_model], schedule


@torch.no_grad()
def figures(model: nn.Module, data: Split, centers: Tensor | None, classes: int) -> Figures:
    """What is reported of a trained model, on `data`; None that there is no learned center for."""
    model.eval()
    outputs = [model(images) for images in data.images.split(500)]
    features, logits = (torch.cat(parts) for parts in zip(*outputs, strict=True))
    labels = data.labels
    means = metrics.class_centers(features, labels, classes)
    cosines = torch.nn.functional.normalize(means, dim=-1)
    between = (cosines @ cosines.mT).fill_diagonal_(-1)
    right = logits.argmax(-1) == labels
    recalls = [right[labels == label].double().mean() for label in labels.unique()]
    found: dict[str, Tensor | None] = {
        "accuracy": 100 * right.double().mean(),
        "recall": 100 * torch.stack(recalls).mean(),
        "calibration": 100 * calibration_error(logits, right),
        "intra": metrics.intra_class_similarity(features, labels, means),
        "inter": metrics.inter_class_similarity(means),
        "closest": between.max(),
        "norm": features.norm(dim=-1).mean(),
        "agreement": None,
        "agreement_lowest": None,
        "nearest": None,
    }
    if centers is not None:
        agreements = metrics.center_agreement(centers.detach(), means, reduction="none")
        known = agreements[~agreements.isnan()]
        nearest = metrics.nearest_center(features, centers.detach())
        assert isinstance(nearest, Tensor)
        found |= {
            "agreement": known.mean(),
            "agreement_lowest": known.min(),
            "nearest": 100 * (nearest == labels).double().mean(),
        }
    return {
        name: None if value is None or not value.isfinite() else float(f"{float(value):.4g}")
        for name, value in found.items()
    }


def calibration_error(logits: Tensor, right: Tensor) -> Tensor:
    """How far the confidence is from the share of right answers, over bins of it (ECE)."""
    confidence = logits.double().softmax(-1).amax(-1)
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = confidence.new_zeros(BINS).index_add_(0, place, confidence - right.double())
    return sums.abs().sum() / len(logits)
