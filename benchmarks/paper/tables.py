"""The page of the experiment, beside the paper's figures, and a picture of each feature space."""

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
from benchmarks.paper.runs import Recipe, Trained, TrainingSet
from benchmarks.training import METHODS
from separate_loss import metrics, plots

Runs = Sequence[Mapping[str, Any]]  # one for each seed
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
# The paper's accuracies on data sets that were not trained on, by training set.
ACROSS = {
    ("AffectNet", "CK+"): "82.04",
    ("AffectNet", "MMI"): "71.39",
    ("RAF-DB basic", "CK+"): "81.38",
    ("RAF-DB basic", "MMI"): "69.71",
}
DIFFERENCES = """The last epoch is reported, and none is chosen by what is reported. Not said in the
paper, and chosen here: momentum 0.9, weight decay 5e-4, mirrored pictures as the only augmentation,
where centers start and how fast they move (the package's defaults). The paper does not say whether
its similarities are of true class means or of learned centers; both are here."""


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
        f"{settings['weights'] or 'its library'}"
        f"{', a neck' if settings['neck'] else ''}; pictures of {settings['size']} pixels, batches "
        f"of {settings['batch_size']} on {settings['processes']} process(es), SGD at "
        f"{trainings[0][0].rate}. {DIFFERENCES}",
        provenance(results.environment),
    ]
    for data in {data.name: data for _, data in trainings}.values():
        groups: dict[Recipe, list[Mapping[str, Any]]] = {}
        for recipe, other in trainings:
            key = recipe.key(data.name)
            if other.name == data.name and key in results.measured:
                groups.setdefault(recipe._replace(seed=0), []).append(results.measured[key])
        parts += _of_one_set(data, groups, test_sets)
    return "\n\n".join(parts) + "\n"


def _of_one_set(
    data: TrainingSet, groups: Mapping[Recipe, Runs], test_sets: Mapping[str, Part]
) -> list[str]:
    recipe = next(iter(groups))
    counts = data.reported.counts(data.class_names).items()
    softmax, both = map(str, data.accuracies)
    rows = [[_title(one), *_spreads(runs, COLUMNS), len(runs)] for one, runs in groups.items()]
    # The similarities are those of Table 1, on RAF-DB.
    rows += [["softmax loss, the paper", softmax, "-", "0.92", "0.89", *"-----"]]
    rows += [["both, the paper", both, "-", "0.94", "0.75", *"-----"]]
    parts = [
        f"## {data.name}",
        f"{len(data.training.target):,} pictures to train on, {len(data.reported.target):,} "
        f"reported ({', '.join(f'{name} {number}' for name, number in counts)}); {recipe.epochs} "
        f"epochs, the rate divided by 10 every {recipe.drop_every} (the paper: {data.epochs} and "
        f"{data.drop_every}).",
        table(["loss", *COLUMNS.values(), "seeds"], rows),
        "### Agreement of learned centers with class means, after the first epoch and the last",
        _agreements(data, groups),
    ]
    if test_sets and len(data.class_names) == len(BASIC):
        parts += ["### On data that were not trained on", _across(data, groups, test_sets)]
    parts.append("### The first seed: features by t-SNE (Figure 3), and confusions")
    for recipe, runs in groups.items():
        confusion = zip(data.class_names, runs[0]["confusion"], strict=True)
        rows = [[name, *row] for name, row in confusion]
        text = "Features by t-SNE, classes in colour, with true and learned centers"
        picture = f"![{text}: {recipe.method}]({file_name(recipe.key(data.name))}.png)"
        parts += [f"{_title(recipe)}; rows for true classes:", picture]
        parts.append(table(["", *data.class_names], rows))
    return parts


def file_name(key: str) -> str:
    """A training's key without the characters that file names should not have."""
    return "-".join("".join(one if one.isalnum() else " " for one in key).split())


def _title(recipe: Recipe) -> str:
    weight = f", {recipe.weight:g}" if recipe.method != "softmax" else ""
    dim = "" if recipe.feature_dim is None else f", {recipe.feature_dim} features"
    return METHODS[recipe.method].title + weight + dim


def _spreads(runs: Runs, names: Sequence[str] | Mapping[str, str]) -> list[str]:
    return [format_spread([run[name] for run in runs], 2) for name in names]


def _agreements(data: TrainingSet, groups: Mapping[Recipe, Runs]) -> str:
    rows = []
    for recipe, runs in groups.items():
        first, last = (runs[0]["course"][epoch]["agreements"] for epoch in (0, -1))
        pairs = [
            " to ".join("-" if value is None else f"{value:.2f}" for value in pair)
            for pair in zip(first, last, strict=True)
        ]
        rows += [[_title(recipe), *pairs]] if pairs else []
    return table(["loss", *data.class_names], rows)


def _across(data: TrainingSet, groups: Mapping[Recipe, Runs], test_sets: Mapping[str, Part]) -> str:
    rows = []
    for name in test_sets:
        for recipe, runs in groups.items():
            found = [run["across"][name] for run in runs]
            missing = set(range(len(BASIC))) - set(found[0]["classes"])
            without = ", without " + ", ".join(BASIC[label] for label in sorted(missing))
            shown = f"{name}, {found[0]['pictures']:,} pictures{without if missing else ''}"
            theirs = ACROSS.get((data.name, name), "-") if recipe.method == "paper" else "-"
            rows.append([shown, _title(recipe), *_spreads(found, ["accuracy", "recall"]), theirs])
    header = ["data", "loss", "accuracy, %", "mean recall, %", "the paper's accuracy"]
    return table(header, rows)


def draw(trained: Trained, names: Sequence[str], path: Path) -> None:
    """The paper's Figure 3: features by t-SNE, with true and learned centers."""
    _, found, centers = trained
    chosen = np.random.default_rng(0).permutation(len(found.labels))[:2000]
    features = found.features[chosen]
    present, labels = found.labels[chosen].unique(return_inverse=True)
    parts = [features, metrics.class_centers(features, labels, len(present))]
    if centers is not None:
        parts.append(centers[present])
    # By direction, which is what the loss sees.
    rows = F.normalize(torch.cat([part.double() for part in parts]), dim=-1)
    perplexity = min(30, len(rows) // 4)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows.numpy())
    points, *marked = torch.from_numpy(plane).split([len(part) for part in parts])
    figure = Figure(figsize=(7, 7), layout="constrained", facecolor="white")
    plots.feature_space(
        points,
        labels,
        true_centers=marked[0],
        learned_centers=marked[1] if centers is not None else None,
        class_names=[names[label] for label in present],
        axes=figure.subplots(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
