"""The page of the experiment, beside the paper's figures, and a picture of each feature space."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch.nn import functional as F

from benchmarks.data.expressions import BASIC, Part
from benchmarks.harness import Results, format_spread, provenance, table
from benchmarks.paper.runs import RATE, Recipe, Trained, TrainingSet
from benchmarks.training import METHODS
from separate_loss import metrics, plots

Runs = Sequence[Mapping[Any, Any]]  # one for each seed
COLUMNS = {
    "accuracy": "accuracy, %",
    "recall": "mean recall, %",
    "intra": "cosine of features to class means",
    "inter": "between class means",
    "closest": "of the two closest",
    "inter_learned": "between learned centers",
    "agreement": "agreement of learned centers",
    "nearest": "accuracy of the nearest center, %",
}
# Of softmax loss alone and of both; the cosines are those of its Table 1.
PAPER: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "RAF-DB basic": (
        {"accuracy": 85.66, "intra": 0.92, "inter": 0.89},
        {"accuracy": 86.38, "intra": 0.94, "inter": 0.75, "CK+": 81.38, "MMI": 69.71},
    ),
    "RAF-DB compound": ({"accuracy": 56.94}, {"accuracy": 58.84}),
    "AffectNet": ({"accuracy": 58.37}, {"accuracy": 58.89, "CK+": 82.04, "MMI": 71.39}),
}


def page(
    results: Results,
    trainings: Sequence[tuple[Recipe, TrainingSet]],
    test_sets: Mapping[str, Part],
) -> str:
    """All tables, as Markdown."""
    settings = results.settings
    parts = [
        "# The paper's experiment",
        f"Written by `python -m benchmarks paper`. {settings['model']}, weights: "
        f"{settings['weights'] or 'of timm'}; pictures of {settings['size']} pixels, batches of "
        f"{settings['batch_size']} on {settings['processes']} process(es), SGD at "
        f"{RATE}. The last epoch is reported, and nothing is chosen by it.",
        provenance(results.environment),
    ]
    for data in {data.name: data for _, data in trainings}.values():
        groups: dict[Recipe, list[Mapping[Any, Any]]] = {}
        for recipe, other in trainings:
            key = recipe.key(data.name)
            if other.name == data.name and key in results.measured:
                groups.setdefault(recipe._replace(seed=0), []).append(results.measured[key])
        parts += _of_one_set(data, groups, test_sets if data.class_names is BASIC else {})
    return "\n\n".join(parts) + "\n"


def _of_one_set(
    data: TrainingSet, groups: Mapping[Recipe, Runs], test_sets: Mapping[str, Part]
) -> list[str]:
    recipe, names = next(iter(groups)), data.class_names
    columns = COLUMNS | {name: _described(name, part) for name, part in test_sets.items()}
    rows, agreements, figures = [], [], []
    for recipe, runs in groups.items():
        title = f"{METHODS[recipe.method].title}, {recipe.weight:g}".removesuffix(", 0")
        found = [{**run, **run["across"]} for run in runs]
        cells = [format_spread([run[name] for run in found], 2) for name in columns]
        rows.append([title, *cells, len(runs)])
        for epoch, when in ((0, "first epoch"), (-1, "last epoch")):
            of_classes = zip(*(run["course"][epoch]["agreements"] for run in runs), strict=True)
            if cells := [format_spread(values, 2) for values in of_classes]:
                agreements.append([f"{title}, {when}", *cells])
        text = "Features by t-SNE, classes in colour, with true and learned centers"
        confusion = zip(names, runs[0]["confusion"], strict=True)
        figures += [
            f"**{title}**; rows for true classes:",
            f"![{text}: {recipe.method}]({file_name(recipe.key(data.name))}.png)",
            table(["", *names], [[name, *counts] for name, counts in confusion]),
        ]
    for title, one in zip(("softmax loss", "both"), PAPER.get(data.name, ()), strict=False):
        rows.append([f"{title}, the paper", *(one.get(name, "-") for name in columns), "-"])
    return [
        f"## {data.name}",
        f"{pictures(data)}; {recipe.epochs} epochs, the rate divided by 10 every "
        f"{recipe.drop_every}.",
        table(["loss", *columns.values(), "seeds"], rows),
        "### Agreement of learned centers with class means",
        table(["loss", *names], agreements),
        "### The first seed: features by t-SNE (Figure 3), and confusions",
        *figures,
    ]


def pictures(data: TrainingSet) -> str:
    """How many there are, and how many are identical."""
    counts = data.reported.counts(data.class_names)
    return (
        f"{len(data.training.target):,} pictures to train on, {len(data.reported.target):,} "
        f"reported ({', '.join(f'{name} {count}' for name, count in counts.items())}), of which "
        f"{data.identical:,} are also trained on"
    )


def _described(name: str, part: Part) -> str:
    missing = [one for one in BASIC if one not in part.counts(BASIC)]
    without = f", without {' and '.join(missing)}" if missing else ""
    return f"accuracy on {name}, {len(part.target):,} pictures{without}, %"


def file_name(key: str) -> str:
    """A training's key without the characters that file names should not have."""
    return re.sub(r"\W+", "-", key)


def draw(trained: Trained, names: Sequence[str], path: Path) -> None:
    """The paper's Figure 3: features by t-SNE, with true and learned centers."""
    features, _, labels = trained.outputs
    chosen = np.random.default_rng(0).permutation(len(labels))[:2000]
    present, labels = labels[chosen].unique(return_inverse=True)
    parts = [features[chosen], metrics.class_centers(features[chosen], labels, len(present))]
    if trained.centers is not None:
        parts.append(trained.centers[present])
    # By direction, which is what the loss sees.
    rows = F.normalize(torch.cat(parts).double(), dim=-1)
    perplexity = min(30, len(rows) // 4)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows.numpy())
    points, means, *learned = torch.from_numpy(plane).split([len(part) for part in parts])
    figure = Figure(figsize=(7, 7), layout="constrained", facecolor="white")
    plots.feature_space(
        points,
        labels,
        true_centers=means,
        learned_centers=learned[0] if learned else None,
        class_names=[names[label] for label in present],
        axes=figure.subplots(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
