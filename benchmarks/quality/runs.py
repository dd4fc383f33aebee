"""One training, from its setting to its figures."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from benchmarks.quality.data import DATA, DataSet, Place, Sides
from benchmarks.quality.methods import METHODS, CosineHead, Method, Problem
from benchmarks.samples import FeatureKind, Split
from separate_loss import metrics

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features, logits, labels
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
        """A name within the data set that says what differs between its runs."""
        words = [
            f"{self.kind}: {self.method} {self.weight:g}, rate {self.rate:g}, seed {self.seed}"
        ]
        if self.batch_size != DATA[self.data].batch_size:
            words.append(f"batches of {self.batch_size}")
        if self.scale != 1:
            words.append(f"scale {self.scale:g}")
        return ", ".join([*words, *(["tuning"] if self.tuning else [])])


class Training(NamedTuple):
    """A training that `epochs` goes on with, one at a time."""

    model: nn.Module
    criterion: nn.Module | None
    sides: Sides
    epochs: Iterator[int]

    @property
    def centers(self) -> Tensor | None:
        """The learned ones, (C, d)."""
        centers = getattr(self.criterion, "centers", None)
        return centers.detach() if isinstance(centers, Tensor) else None


def start(
    setting: Setting,
    place: Place | None = None,
    device: str = "cpu",
    sides: Sides | None = None,
    most: int | None = None,
) -> Training:
    """Sets a training up: on `sides` rather than those of the data set, of `most` samples each.

    Methods start from the same weights under the same seed, and see the same batches.
    """
    data, method, place = DATA[setting.data], METHODS[setting.method], place or Place()
    if sides is None:
        sides, classes = data.sides(place, setting.seed, setting.tuning), data.classes(place)
    else:
        classes = int(sides.training.labels.max()) + 1
    training, measured = (Split(*(part[:most].to(device) for part in side)) for side in sides)
    torch.manual_seed(setting.seed)
    model = data.network(place, setting.kind, classes, setting.scale).to(device)
    counts = training.labels.bincount(minlength=classes)
    criterion = method.build(Problem(counts, data.feature_dim, setting.weight))
    if criterion is not None:
        criterion.to(device)
    if method.is_head:
        model.classifier = CosineHead(criterion)
    # A batch of one sample has no variance for a neck: it is left out.
    steps = setting.epochs * math.ceil((len(training.labels) - 1) / setting.batch_size)
    moving, schedule = optimizers(model, criterion, data, method, setting.rate, steps)
    epochs = train(
        model,
        training,
        objective(criterion, method, setting.weight),
        moving,
        epochs=setting.epochs,
        batch_size=setting.batch_size,
        seed=setting.seed,
        schedule=schedule,
        augment=data.augment,
    )
    return Training(model, criterion, Sides(training, measured), epochs)


def run(
    setting: Setting, place: Place | None = None, device: str = "cpu", most: int | None = None
) -> list[float | None]:
    """Trains once, on one thread; gives the figures in their order, as many as are wanted."""
    torch.set_num_threads(1)
    training = start(setting, place, device, most=most)
    for _ in training.epochs:
        pass
    found = figures(training, training.sides.measured)
    if setting.brief:
        return [found["accuracy"]]
    seen = figures(training, training.sides.training)
    return [{**found, "train_accuracy": seen["accuracy"]}[name] for name in FIGURES]


def train(
    model: nn.Module,
    data: Split,
    loss: Loss,
    optimizers: Sequence[Optimizer],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    schedule: LRScheduler,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None,
) -> Iterator[int]:
    """Trains, yielding after each epoch; `schedule` goes on with each step."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(data.labels), generator=generator).split(batch_size):
            images = data.images[chosen]
            if augment is not None:
                images = augment(images, generator)
            if len(chosen) > 1:
                yield images, data.labels[chosen]

    for epoch in range(epochs):
        for _ in steps(model, batches(), loss, optimizers):
            schedule.step()
        yield epoch


def steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    optimizers: Sequence[Optimizer],
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> Iterator[Tensor]:
    """Trains on each batch, yielding the loss."""
    model.train()
    for images, labels in batches:
        features, logits = model(images)
        value = loss(features, logits, labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(value)
        for optimizer in optimizers:
            optimizer.step()
        yield value.detach()


def objective(criterion: nn.Module | None, method: Method, weight: float) -> Loss:
    """What is minimised: the head's loss, or softmax loss and the criterion's beside it."""

    def loss(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        if criterion is None:
            return F.cross_entropy(logits, labels)
        beside: Tensor = criterion(features, labels)
        return beside if method.is_head else F.cross_entropy(logits, labels) + weight * beside

    return loss


def optimizers(
    model: nn.Module,
    criterion: nn.Module | None,
    data: DataSet,
    method: Method,
    rate: float,
    steps: int,
) -> tuple[list[Optimizer], LRScheduler]:
    """AdamW in one cycle or SGD along a cosine for the network; SGD for learned centers."""
    schedule: LRScheduler
    of_model: Optimizer
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
def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits, in evaluation."""
    model.eval()
    parts = [model(some) for some in images.split(500)]
    features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return features, logits


def figures(training: Training, data: Split) -> Figures:
    """What is reported of a model, on `data`; None that there is no learned center for."""
    return summary(*outputs(training.model, data.images), data.labels, training.centers)


def summary(features: Tensor, logits: Tensor, labels: Tensor, centers: Tensor | None) -> Figures:
    """The same, of features and logits."""
    classes = logits.shape[1]
    means = metrics.class_centers(features, labels, classes)
    cosines = F.normalize(means, dim=-1)
    between = (cosines @ cosines.mT).fill_diagonal_(-1)
    right = logits.argmax(-1) == labels
    recalls = [right[labels == label].double().mean() for label in labels.unique()]
    found: dict[str, Tensor | None] = {
        "accuracy": 100 * right.double().mean(),
        "recall": 100 * torch.stack(recalls).mean(),
        "calibration": 100 * calibration_error(logits, right),
        "intra": metrics.intra_class_similarity(features, labels, means),
        "inter": metrics.inter_class_similarity(means),
        "closest": between.nan_to_num(-1).max(),  # without classes that are absent
        "norm": features.norm(dim=-1).mean(),
        "agreement": None,
        "agreement_lowest": None,
        "nearest": None,
    }
    if centers is not None:
        agreements = metrics.center_agreement(centers, means, reduction="none")
        known = agreements[~agreements.isnan()]
        nearest = metrics.nearest_center(features, centers)
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
