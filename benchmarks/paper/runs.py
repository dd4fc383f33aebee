"""One training by accelerate: on a CPU, a GPU or several, resumable after each epoch."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.backbone import Classifier, prepared
from benchmarks.expressions import Part, Pictures
from benchmarks.paper.sets import TrainingSet
from benchmarks.quality.methods import METHODS, Problem
from benchmarks.quality.runs import objective, steps, summary
from separate_loss import metrics

__all__ = ["Recipe", "run"]


class Recipe(NamedTuple):
    """What a training is made of, beside its data; the paper's where it says something."""

    model: str
    weights: str | None
    method: str  # of the study
    weight: float
    seed: int
    epochs: int
    drop_every: int
    feature_dim: int | None = None
    neck: bool = False
    size: int = 224
    batch_size: int = 100
    rate: float = 0.01
    momentum: float = 0.9
    decay: float = 5e-4

    def key(self, name: str) -> str:
        """A name that says what differs between runs."""
        dim = "" if self.feature_dim is None else f", {self.feature_dim} features"
        return f"{name}: {self.method} {self.weight:g}{dim}, seed {self.seed}"


class Evaluated(NamedTuple):
    features: Tensor
    logits: Tensor
    labels: Tensor


def run(
    recipe: Recipe,
    data: TrainingSet,
    others: Mapping[str, Part],
    accelerator: Accelerator,
    checkpoint: Path,
    workers: int,
) -> tuple[dict[str, Any], Evaluated, Tensor | None]:
    """Trains, and gives the figures of the last epoch, what they are of, and learned centers."""
    torch.manual_seed(recipe.seed)
    classes = len(data.class_names)
    model: Any = Classifier(
        recipe.model, recipe.weights, classes, recipe.feature_dim, neck=recipe.neck
    )
    target = data.training.target
    labels = target.argmax(1) if target.is_floating_point() else target
    counts = labels.bincount(minlength=classes)
    method = METHODS[recipe.method]
    criterion = method.build(Problem(counts, model.feature_dim, recipe.weight))
    optimizer: Any = torch.optim.SGD(
        model.parameters(), recipe.rate, momentum=recipe.momentum, weight_decay=recipe.decay
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.drop_every)
    loader: Any = _loader(data.training, recipe, workers, train=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if criterion is not None:
        criterion.to(accelerator.device)
    of_what = f"{data.name}, {len(target)} pictures, {recipe}"
    state = _State(
        accelerator.unwrap_model(model), criterion, optimizer, schedule, checkpoint, of_what
    )
    course, begin = state.load()
    loss = objective(criterion, method, recipe.weight)
    began = time.perf_counter()
    found = None
    for epoch in range(begin, recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch)
        # Read once an epoch: a step waits for no value.
        values = torch.stack([*steps(model, loader, loss, [optimizer], accelerator.backward)])
        if not values.isfinite().all():
            raise ValueError(f"the loss is not finite in epoch {epoch + 1}: lower the rate")
        schedule.step()
        found = _evaluate(model, data.reported, recipe, accelerator, workers)
        course.append(_course(found, state.centers, classes))
        state.save(course, epoch + 1, accelerator)
        if accelerator.is_main_process:
            left = (time.perf_counter() - began) / (epoch + 1 - begin) * (recipe.epochs - epoch - 1)
            print(
                f"{recipe.key(data.name)}, epoch {epoch + 1}/{recipe.epochs}: loss "
                f"{values.mean():.3f}, accuracy {course[-1]['accuracy']:.2f} %, "
                f"{left / 60:.0f} min left of this run",
                flush=True,
            )
    if found is None:
        found = _evaluate(model, data.reported, recipe, accelerator, workers)
    record: dict[str, Any] = {**summary(*found, state.centers)}
    record["inter_learned"] = None
    if state.centers is not None:
        record["inter_learned"] = metrics.inter_class_similarity(state.centers).item()
    record["course"] = course
    record["confusion"] = _confusion(found, classes)
    record["across"] = {
        name: _across(_evaluate(model, part, recipe, accelerator, workers))
        for name, part in others.items()
        if classes == 7
    }
    return record, found, state.centers


class _State(NamedTuple):
    """What a checkpoint holds."""

    model: nn.Module
    criterion: nn.Module | None
    optimizer: Any
    schedule: Any
    path: Path
    of_what: str

    @property
    def centers(self) -> Tensor | None:
        centers = getattr(self.criterion, "centers", None)
        return centers.detach().cpu() if isinstance(centers, Tensor) else None

    def load(self) -> tuple[list[dict[str, Any]], int]:
        if not self.path.exists():
            return [], 0
        stored = torch.load(self.path, weights_only=True, map_location="cpu")
        if stored["of_what"] != self.of_what:
            raise ValueError(
                f"{self.path} is of {stored['of_what']}, and this run of {self.of_what}: pass "
                "--fresh to drop it, or another --output"
            )
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.schedule.load_state_dict(stored["schedule"])
        if self.criterion is not None:
            self.criterion.load_state_dict(stored["criterion"])
        return stored["course"], stored["epoch"]

    def save(self, course: list[dict[str, Any]], epoch: int, accelerator: Accelerator) -> None:
        if accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "model": self.model.state_dict(),
                "criterion": {} if self.criterion is None else self.criterion.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "course": course,
                "epoch": epoch,
                "of_what": self.of_what,
            }
            half = self.path.with_suffix(".half")
            torch.save(content, half)
            half.replace(self.path)
        accelerator.wait_for_everyone()


def _loader(part: Part, recipe: Recipe, workers: int, *, train: bool) -> Any:
    return DataLoader(
        Pictures(part, prepared(recipe.size, mirror=train)),
        recipe.batch_size,
        shuffle=train,
        # A batch of one sample has no variance for a neck.
        drop_last=train and len(part.target) % recipe.batch_size == 1,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


@torch.no_grad()
def _evaluate(
    model: Any, part: Part, recipe: Recipe, accelerator: Accelerator, workers: int
) -> Evaluated:
    loader: Any = accelerator.prepare(_loader(part, recipe, workers, train=False))
    model.eval()
    parts: list[list[Tensor]] = [[], [], []]
    for pictures, labels in loader:
        gathered = accelerator.gather_for_metrics((*model(pictures), labels))
        for held, one in zip(parts, gathered, strict=True):
            held.append(one.float().cpu() if one.is_floating_point() else one.cpu())
    return Evaluated(*(torch.cat(held) for held in parts))


def _course(found: Evaluated, centers: Tensor | None, classes: int) -> dict[str, Any]:
    right = found.logits.argmax(-1) == found.labels
    agreements: list[float | None] = []
    if centers is not None:
        means = metrics.class_centers(found.features, found.labels, classes)
        values = metrics.center_agreement(centers, means, reduction="none").tolist()
        agreements = [None if value != value else round(value, 4) for value in values]  # noqa: PLR0124
    return {"accuracy": 100 * right.double().mean().item(), "agreements": agreements}


def _confusion(found: Evaluated, classes: int) -> list[list[int]]:
    """Counts, a row for each true class."""
    places = found.labels * classes + found.logits.argmax(-1)
    rows: list[list[int]] = places.bincount(minlength=classes**2).view(classes, classes).tolist()
    return rows


def _across(found: Evaluated) -> dict[str, Any]:
    right = found.logits.argmax(-1) == found.labels
    present = found.labels.unique()
    recalls = torch.stack([right[found.labels == label].double().mean() for label in present])
    return {
        "accuracy": 100 * right.double().mean().item(),
        "recall": 100 * recalls.mean().item(),
        "classes": present.tolist(),
        "pictures": len(right),
    }
