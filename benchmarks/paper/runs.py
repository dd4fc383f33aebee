"""One training with accelerate: on a CPU, a GPU or several, resumable after each epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.data.expressions import Part, Pictures
from benchmarks.networks import backbone_classifier
from benchmarks.training import METHODS, evaluate, learned_centers, train_steps
from separate_loss import metrics

Outputs = tuple[Tensor, Tensor, Tensor]  # features, logits, labels
RATE = 0.01


class TrainingSet(NamedTuple):
    """A data set to train on, with the paper's schedule."""

    name: str
    training: Part
    reported: Part
    class_names: Sequence[str]
    epochs: int
    drop_every: int  # epochs after which the rate is divided by 10
    identical: int = 0  # reported pictures that are also trained on


class Recipe(NamedTuple):
    """The settings of a training; the paper's, where the paper gives them."""

    model: str
    weights: str | None
    method: str  # of `METHODS`
    weight: float
    seed: int
    epochs: int
    drop_every: int
    size: int = 224
    batch_size: int = 100

    def key(self, name: str) -> str:
        """A name that differs between the trainings of a command."""
        return f"{name}: {self.method} {self.weight:g}, seed {self.seed}"


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
    model: Any = backbone_classifier(recipe.model, recipe.weights, classes)
    method = METHODS[recipe.method]
    counts = data.training.labels.bincount(minlength=classes)
    criterion = method.build(counts, model.feature_dim, recipe.weight).to(accelerator.device)
    optimizer: Any = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, recipe.drop_every)
    loader: Any = _loader(data.training, recipe, workers, train=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    state = [accelerator.unwrap_model(model), criterion, optimizer, schedule]
    course: list[dict[str, Any]] = []  # figures of each epoch
    if checkpoint.exists():
        stored = torch.load(checkpoint, weights_only=True, map_location="cpu")
        course = stored["course"]
        for one, values in zip(state, stored["state"], strict=True):
            one.load_state_dict(values)
    objective = method.objective(criterion, recipe.weight)

    def outputs_on(part: Part) -> Outputs:
        return _outputs(model, _loader(part, recipe, workers, train=False), accelerator)

    found = None
    for epoch in range(len(course), recipe.epochs):
        torch.manual_seed(1000 * recipe.seed + epoch)
        steps = train_steps(model, loader, objective, [optimizer], accelerator.backward)
        losses = torch.stack([*steps])  # read once an epoch: a step waits for no value
        if not losses.isfinite().all():
            raise ValueError(f"the loss is not finite in epoch {epoch + 1}: lower the rate")
        schedule.step()
        found = outputs_on(data.reported)
        course.append(_figures(found, learned_centers(criterion)))
        if accelerator.is_main_process:
            _save(checkpoint, state, course)
            print(
                f"{recipe.key(data.name)}, epoch {epoch + 1}/{recipe.epochs}: loss "
                f"{losses.mean():.3f}, accuracy {course[-1]['accuracy']:.2f} %",
                flush=True,
            )
        accelerator.wait_for_everyone()
    found = found or outputs_on(data.reported)
    cells = (found[2] * classes + found[1].argmax(-1)).bincount(minlength=classes**2)
    record = course[-1] | {
        "confusion": cells.view(classes, classes).tolist(),  # a row for each true class
        "across": {name: evaluate(*outputs_on(part))["accuracy"] for name, part in others.items()},
        "course": course,
    }
    centers = learned_centers(criterion)
    return Trained(record, found, None if centers is None else centers.cpu())


def _save(path: Path, state: Sequence[Any], course: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"state": [one.state_dict() for one in state], "course": course}, partial)
    partial.replace(path)


def _loader(part: Part, recipe: Recipe, workers: int, *, train: bool) -> Any:
    return DataLoader(
        Pictures(part, recipe.size, mirror=train),
        recipe.batch_size,
        shuffle=train,
        # Batch normalisation of a small picture needs two samples.
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
    features, logits, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    return features, logits, labels


def _figures(outputs: Outputs, centers: Tensor | None) -> dict[str, Any]:
    """All of `evaluate`, and of learned centers the agreement of each class and their cosine."""
    features, _, labels = outputs
    found: dict[str, Any] = {"agreements": [], "inter_learned": None}
    if centers is not None:
        centers = centers.cpu()
        means = metrics.class_centers(features, labels, len(centers))
        values = metrics.center_agreement(centers, means, reduction="none").tolist()
        found["agreements"] = [None if np.isnan(value) else round(value, 4) for value in values]
        found["inter_learned"] = metrics.inter_class_similarity(centers).item()
    return evaluate(*outputs, centers) | found
