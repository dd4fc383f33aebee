"""The page of the experiment, beside the paper's figures, and a picture of each feature space."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.demo import in_the_plane
from benchmarks.expressions import BASIC, COMPOUND, Part, counts
from benchmarks.paper.runs import Evaluated, Recipe
from benchmarks.paper.sets import ACROSS, TRAINED, TrainingSet
from benchmarks.quality.methods import METHODS
from benchmarks.quality.statistics import show_spread
from benchmarks.report import Results, provenance, table
from separate_loss import metrics, plots

__all__ = ["draw", "file_name", "page", "picture_name"]

Jobs = Sequence[tuple[Recipe, TrainingSet]]
# The paper's Table 1 of RAF-DB, softmax loss and both.
SIMILARITIES = {"intra": (0.92, 0.94), "inter": (0.89, 0.75)}
DIFFERENCES = """The last epoch is reported, and none is chosen by what is reported. Not said in the
paper, and chosen here: momentum 0.9, weight decay 5e-4, mirrored pictures as the only augmentation,
where centers start and how fast they move (the package's defaults). The paper does not say whether
its similarities are of true class means or of learned centers; both are here."""


def page(results: Results, jobs: Jobs, tested: Mapping[str, Part]) -> str:
    """Everything, as Markdown."""
    settings = results.settings
    found = dict(results.measured)
    recipe = jobs[0][0]
    parts = [
        "# The paper's experiment",
        f"Written by `python -m benchmarks paper`. {settings['model']}, weights: "
        f"{settings['weights'] or 'its library'}"
        f"{', a neck' if settings['neck'] else ''}; pictures of {settings['size']} pixels, batches "
        f"of {settings['batch_size']} on {settings['processes']} process(es), SGD at "
        f"{recipe.rate}. {DIFFERENCES}",
        provenance(results.environment),
    ]
    for data in dict.fromkeys(one.name for _, one in jobs):
        here = [(recipe, one) for recipe, one in jobs if one.name == data]
        parts += _of_one(found, here, tested)
    return "\n\n".join(parts) + "\n"


def _of_one(found: Mapping[str, Any], jobs: Jobs, tested: Mapping[str, Part]) -> list[str]:
    data = jobs[0][1]
    groups: dict[Recipe, list[Mapping[str, Any]]] = {}
    for recipe, _ in jobs:
        key = recipe.key(data.name)
        if key in found:
            groups.setdefault(recipe._replace(seed=0), []).append(found[key])
    usual = {one: runs for one, runs in groups.items() if one.feature_dim is None}
    sizes = ", ".join(f"{name} {number}" for name, number in _counts(data).items())
    parts = [
        f"## {data.name}",
        f"{len(data.training.target):,} pictures to train on, {len(data.reported.target):,} "
        f"reported ({sizes}); {jobs[0][0].epochs} epochs, the rate divided by 10 every "
        f"{jobs[0][0].drop_every} (the paper: {data.epochs} and {data.drop_every}).",
        _accuracy(data, usual),
        "### Cosines",
        _cosines(usual),
        "### Agreement of learned centers with class means, after the first epoch and the last",
        _agreements(data, usual),
    ]
    if tested and len(data.class_names) == len(BASIC):
        parts += ["### On data that were not trained on", _across(data, usual, tested)]
    if sum(one.method == "paper" for one in groups) > 1:
        parts += ["### Weights and sizes of the features (Figure 4)", _swept(groups)]
    parts.append("### Features of the first seed, by t-SNE (Figure 3)")
    for recipe in usual:
        text = "Features by t-SNE, classes in colour, with true and learned centers"
        picture = picture_name(recipe.key(data.name))
        parts += [_title(recipe), f"![{text}: {recipe.method}]({picture})"]
    parts += ["### Confusions of the first seed, rows for true classes"]
    for recipe, runs in usual.items():
        rows = [
            [name, *counted]
            for name, counted in zip(data.class_names, runs[0]["confusion"], strict=True)
        ]
        parts += [_title(recipe), table(["", *data.class_names], rows)]
    return parts


def picture_name(key: str) -> str:
    """The file that shows a run's features."""
    return f"{file_name(key)}.png"


def file_name(key: str) -> str:
    """A run's key without what files' names should not have."""
    return "-".join("".join(one if one.isalnum() else " " for one in key).split())


def _counts(data: TrainingSet) -> Mapping[str, int]:
    names = COMPOUND if len(data.class_names) == len(COMPOUND) else BASIC
    return counts(data.reported, names)


def _title(recipe: Recipe) -> str:
    weight = f", {recipe.weight:g}" if recipe.method != "softmax" else ""
    return f"{METHODS[recipe.method].title}{weight}"


def _accuracy(data: TrainingSet, groups: Mapping[Recipe, Sequence[Mapping[str, Any]]]) -> str:
    theirs = next(one[3] for one in TRAINED.values() if one[0] == data.name)
    rows = [
        [
            _title(recipe),
            *(show_spread([run[name] for run in runs], 2) for name in ("accuracy", "recall")),
            {"softmax": f"{theirs[0]}", "paper": f"{theirs[1]}"}.get(recipe.method, "-"),
            str(len(runs)),
        ]
        for recipe, runs in groups.items()
    ]
    return table(["loss", "accuracy, %", "mean recall, %", "the paper's accuracy", "seeds"], rows)


def _cosines(groups: Mapping[Recipe, Sequence[Mapping[str, Any]]]) -> str:
    names = ("intra", "inter", "closest", "inter_learned", "agreement", "nearest")
    rows = [
        [_title(recipe), *(show_spread([run[name] for run in runs], 2) for name in names)]
        for recipe, runs in groups.items()
    ]
    for number, title in enumerate(("softmax loss, the paper", "both, the paper")):
        rows.append(
            [title, *(str(SIMILARITIES[name][number]) for name in ("intra", "inter")), *"----"]
        )
    header = [
        "loss", "features to class means", "between class means", "the two closest",
        "between learned centers", "agreement", "accuracy of the nearest center, %",
    ]  # fmt: skip
    return table(header, rows)


def _agreements(data: TrainingSet, groups: Mapping[Recipe, Sequence[Mapping[str, Any]]]) -> str:
    rows = []
    for recipe, runs in groups.items():
        first, last = (runs[0]["course"][place]["agreements"] for place in (0, -1))
        if last:
            rows.append(
                [
                    _title(recipe),
                    *(
                        " to ".join("-" if one is None else f"{one:.2f}" for one in pair)
                        for pair in zip(first, last, strict=True)
                    ),
                ]
            )
    return table(["loss", *data.class_names], rows)


def _across(
    data: TrainingSet,
    groups: Mapping[Recipe, Sequence[Mapping[str, Any]]],
    tested: Mapping[str, Part],
) -> str:
    rows = []
    for name in tested:
        for recipe, runs in groups.items():
            one = runs[0]["across"][name]
            missing = [BASIC[place] for place in range(len(BASIC)) if place not in one["classes"]]
            rows.append(
                [
                    f"{name}, {one['pictures']:,} pictures"
                    + (f", without {', '.join(missing)}" if missing else ""),
                    _title(recipe),
                    *(
                        show_spread([run["across"][name][what] for run in runs], 2)
                        for what in ("accuracy", "recall")
                    ),
                    str(ACROSS.get((data.name, name), "-")) if recipe.method == "paper" else "-",
                ]
            )
    header = ["data", "loss", "accuracy, %", "mean recall, %", "the paper's accuracy"]
    return table(header, rows)


def _swept(groups: Mapping[Recipe, Sequence[Mapping[str, Any]]]) -> str:
    rows = [
        [
            _title(recipe)
            + ("" if recipe.feature_dim is None else f", {recipe.feature_dim} features"),
            *(show_spread([run[name] for run in runs], 2) for name in ("accuracy", "recall")),
        ]
        for recipe, runs in groups.items()
        if recipe.method == "paper"
    ]
    return table(["loss", "accuracy, %", "mean recall, %"], rows)


def draw(found: Evaluated, centers: Tensor | None, names: Sequence[str], path: Path) -> None:
    """The paper's Figure 3: features by t-SNE, with true and learned centers."""
    chosen = np.random.default_rng(0).permutation(len(found.labels))[:2000]
    features = found.features[chosen]
    present, labels = found.labels[chosen].unique(return_inverse=True)
    means = metrics.class_centers(features, labels, len(present))
    learned = [] if centers is None else [centers[present]]
    points, *marked = in_the_plane(features, means, *learned)
    figure = Figure(figsize=(7, 7), layout="constrained")
    plots.feature_space(
        points,
        labels,
        true_centers=marked[0],
        learned_centers=marked[1] if len(marked) > 1 else None,
        class_names=[names[place] for place in present],
        axes=figure.subplots(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
