"""One training with accelerate: on a CPU, a GPU or several, resumable after each epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.data.expressions import BASIC, Part, Pictures
from benchmarks.networks import backbone_classifier
from benchmarks.training import METHODS, evaluate, learned_centers, train_steps
from separate_loss import metrics


class TrainingSet(NamedTuple):
    """A data set to train on, with the paper's schedule and its accuracies (softmax, both)."""

    name: str
    training: Part
    reported: Part
    class_names: Sequence[str]
    epochs: int
    drop_every: int  # epochs after which the rate is divided by 10
    accuracies: tuple[float, float]


class Recipe(NamedTuple):
    """The settings of a training; the paper's, where the paper gives them."""

    model: str
    weights: str | None
    method: str  # of `METHODS`
    weight: float
    seed: int
    epochs: int
    drop_every: int
    feature_dim: int | None = None
    neck: bool = False
    size: int = 224
    batch_size: int = 100
    rate: float = 0.01

    def key(self, name: str) -> str:
        """A name that differs between the trainings of a command."""
        dim = "" if self.feature_dim is None else f", {self.feature_dim} features"
        return f"{name}: {self.method} {self.weight:g}{dim}, seed {self.seed}"


class Outputs(NamedTuple):
    features: Tensor
    logits: Tensor
    labels: Tensor


class Trained(NamedTuple):
    record: dict[str, Any]
    outputs: Outputs
    centers: Tensor | None


def run(
    recipe: Recipe,
    data: TrainingSet,
    others: Mapping[str, Part],
    accelerator: Accelerator,
    checkpoint: Path,
    workers: int,
) -> Trained:
    """Trains, and returns the figures of the last epoch, its outputs, and learned centers."""
    torch.manual_seed(recipe.seed)
    classes = len(data.class_names)
    model: Any = backbone_classifier(
        recipe.model, recipe.weights, classes, feature_dim=recipe.feature_dim, neck=recipe.neck
    )
    method = METHODS[recipe.method]
    counts = data.training.labels.bincount(minlength=classes)
    criterion = method.build(counts, model.feature_dim, recipe.weight).to(accelerator.device)
    optimizer: Any = torch.optim.SGD(model.parameters(), recipe.rate, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.drop_every)
    loader: Any = _loader(data.training, recipe, workers, train=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = {
        "model": accelerator.unwrap_model(model),
        "criterion": criterion,
        "optimizer": optimizer,
        "schedule": schedule,
    }
    description = f"{data.name}, {len(data.training.target)} pictures, {recipe}"
    course: list[dict[str, Any]] = _load(checkpoint, state, description)
    objective = method.objective(criterion, recipe.weight)
    begin = len(course)

    def outputs_on(part: Part) -> Outputs:
        return _outputs(model, _loader(part, recipe, workers, train=False), accelerator)

    for epoch in range(begin, recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch)
        steps = train_steps(model, loader, objective, [optimizer], accelerator.backward)
        losses = torch.stack([*steps])  # read once an epoch: a step waits for no value
        if not losses.isfinite().all():
            raise ValueError(f"the loss is not finite in epoch {epoch + 1}: lower the rate")
        schedule.step()
        found = outputs_on(data.reported)
        course.append(_epoch_figures(found, learned_centers(criterion), classes))
        if accelerator.is_main_process:
            _save(checkpoint, state, course, description)
            print(
                f"{recipe.key(data.name)}, epoch {epoch + 1}/{recipe.epochs}: loss "
                f"{losses.mean():.3f}, accuracy {course[-1]['accuracy']:.2f} %",
                flush=True,
            )
        accelerator.wait_for_everyone()
    if begin >= recipe.epochs:
        found = outputs_on(data.reported)
    centers = learned_centers(criterion)
    centers = None if centers is None else centers.cpu()
    record: dict[str, Any] = {**evaluate(*found, centers), "inter_learned": None, "course": course}
    if centers is not None:
        record["inter_learned"] = metrics.inter_class_similarity(centers).item()
    cells = found.labels * classes + found.logits.argmax(-1)
    counts = cells.bincount(minlength=classes**2)
    record["confusion"] = counts.view(classes, classes).tolist()  # a row for each true class
    others = others if classes == len(BASIC) else {}
    record["across"] = {name: _across(outputs_on(part)) for name, part in others.items()}
    return Trained(record, found, centers)


def _load(path: Path, state: Mapping[str, Any], description: str) -> list[dict[str, Any]]:
    """Loads a checkpoint, if there is one, and returns the figures of its epochs."""
    if not path.exists():
        return []
    stored = torch.load(path, weights_only=True, map_location="cpu")
    if stored["description"] != description:
        raise ValueError(
            f"{path} is of {stored['description']}, and this run of {description}: pass --fresh "
            "to drop it, or another --output"
        )
    for name, one in state.items():
        one.load_state_dict(stored[name])
    course: list[dict[str, Any]] = stored["course"]
    return course


def _save(
    path: Path, state: Mapping[str, Any], course: list[dict[str, Any]], description: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {name: one.state_dict() for name, one in state.items()}
    partial = path.with_suffix(".partial")
    torch.save({**states, "course": course, "description": description}, partial)
    partial.replace(path)


def _loader(part: Part, recipe: Recipe, workers: int, *, train: bool) -> Any:
    return DataLoader(
        Pictures(part, recipe.size, mirror=train),
        recipe.batch_size,
        shuffle=train,
        # A batch of one sample has no variance for a neck.
        drop_last=train and len(part.target) % recipe.batch_size == 1,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


@torch.no_grad()
def _outputs(model: Any, loader: Any, accelerator: Accelerator) -> Outputs:
    """Features, logits and labels from all processes, on the CPU."""
    model.eval()
    batches = []
    prepared: Any = accelerator.prepare(loader)
    for pictures, labels in prepared:
        features, logits = model(pictures)
        gathered: Any = accelerator.gather_for_metrics((features.float(), logits.float(), labels))
        batches.append([tensor.cpu() for tensor in gathered])
    return Outputs(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def _epoch_figures(found: Outputs, centers: Tensor | None, classes: int) -> dict[str, Any]:
    correct = found.logits.argmax(-1) == found.labels
    agreements: list[float | None] = []
    if centers is not None:
        means = metrics.class_centers(found.features, found.labels, classes)
        values = metrics.center_agreement(centers.cpu(), means, reduction="none").tolist()
        agreements = [None if np.isnan(value) else round(value, 4) for value in values]
    return {"accuracy": 100 * correct.double().mean().item(), "agreements": agreements}


def _across(found: Outputs) -> dict[str, Any]:
    figures, classes = evaluate(*found, None), found.labels.unique().tolist()
    shared = {name: figures[name] for name in ("accuracy", "recall")}
    return {**shared, "classes": classes, "pictures": len(found.labels)}
