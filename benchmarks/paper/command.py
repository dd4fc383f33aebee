"""The command line: trains what is missing, then writes page and pictures."""

import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from benchmarks.data import expressions
from benchmarks.data.expressions import BASIC, COMPOUND, Part, Parts
from benchmarks.harness import Results, make_parser, write
from benchmarks.networks import backbone_classifier
from benchmarks.paper import tables
from benchmarks.paper.runs import Recipe, TrainingSet, run
from benchmarks.training import PAPER_WEIGHT, WEIGHT

# Of the methods, with the weight of each.
PRESETS = {"paper": ("paper", PAPER_WEIGHT), "simplex": ("simplex", WEIGHT)}
SWEEPS = {
    "weights": tuple(tenths / 10 for tenths in range(1, 12)),
    "features": (64, 128, 256, 512, 768, 1024),
}
# Title, classes, the paper's epochs and drops of the rate, and its accuracies (softmax loss, both).
TRAINING_SETS: dict[str, tuple[Any, ...]] = {
    "raf_db": ("RAF-DB basic", BASIC, 60, 20, (85.66, 86.38)),
    "raf_db_compound": ("RAF-DB compound", COMPOUND, 60, 20, (56.94, 58.84)),
    "affectnet": ("AffectNet", BASIC, 20, 5, (58.37, 58.89)),
}


def _parser() -> ArgumentParser:
    parser = make_parser("paper", "The paper's experiment, on your files.")
    for name, (title, *_) in TRAINING_SETS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, help=f"{title}, to train on")
    parser.add_argument("--votes", action="store_true", help="train on RAF-DB's shares of votes")
    parser.add_argument("--ck-plus", type=Path, help="CK+ or CK+48, to test on")
    parser.add_argument("--mmi", type=Path, help="MMI as a folder per class, to test on")
    parser.add_argument("--fer-2013", type=Path, help="csv, npz or folders, to test on")
    parser.add_argument(
        "--folder", nargs="+", default=[], metavar="NAME=DIR", help="a folder per class, to test on"
    )
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["paper"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default="resnet18", help="of torchvision or timm")
    parser.add_argument("--weights", help='a state dict, or "none"; downloaded by default')
    parser.add_argument("--neck", action="store_true", help="BatchNorm1d before the head")
    parser.add_argument("--epochs", type=int, help="in place of the paper's")
    parser.add_argument("--batch-size", type=int, default=100, help="of each process")
    parser.add_argument("--size", type=int, default=224, help="of the pictures, in pixels")
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[], help="Figure 4")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the experiment; `accelerate launch` runs it in parallel."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        training_sets, test_sets = _training_sets(options), _test_sets(options)
        backbone_classifier(options.model, options.weights, 2)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    accelerator = Accelerator(
        cpu=options.cpu or None,
        mixed_precision=options.precision,
        step_scheduler_with_optimizer=False,
    )
    names = ("model", "neck", "epochs", "batch_size", "size", "precision", "votes")
    settings = {name: getattr(options, name) for name in names} | {
        "weights": options.weights and Path(options.weights).name,
        "processes": accelerator.num_processes,
        "pictures": {data.name: len(data.training.target) for data in training_sets},
    }
    results = Results(options, "results", settings, accelerator.device.type)
    if options.fresh and accelerator.is_main_process:
        shutil.rmtree(options.output / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    trainings = [(one, data) for data in training_sets for one in _recipes(options, data)]
    for number, (recipe, data) in enumerate(trainings, 1):
        if accelerator.is_main_process:
            print(f"[{number}/{len(trainings)}] {recipe.key(data.name)}", flush=True)
        key = recipe.key(data.name)
        if key in results.measured or options.redraw:
            continue
        stem = tables.file_name(key)
        checkpoint = options.output / "checkpoints" / f"{stem}.pt"
        trained = run(recipe, data, test_sets, accelerator, checkpoint, options.workers)
        if accelerator.is_main_process:
            results.once(key, partial(dict, trained.record))
            checkpoint.unlink(missing_ok=True)
            if recipe.seed == 0:
                tables.draw(trained, data.class_names, options.output / f"{stem}.png")
    if accelerator.is_main_process:
        text = tables.page(results, trainings, test_sets)
        write(options.output / "paper.md", text)
        print(f"\n{text}\nWritten to {options.output}")


def _training_sets(options: Namespace) -> list[TrainingSet]:
    """The data sets to train on, with the paper's schedule and accuracies."""
    found = []
    for name, (title, class_names, *paper) in TRAINING_SETS.items():
        home = getattr(options, name)
        if home is None:
            continue
        parts = (
            expressions.affectnet(home)
            if name == "affectnet"
            else expressions.raf_db(home, class_names, votes=options.votes and name == "raf_db")
        )
        reported = parts.get("test") or parts.get("validation")
        if "train" not in parts or reported is None:
            raise ValueError(f"{home}: {title} needs a part to train on and one to test on")
        found.append(TrainingSet(title, parts["train"], reported, class_names, *paper))
    if not found:
        raise ValueError(
            "there is nothing to train on: give one of --raf-db, --raf-db-compound, --affectnet"
        )
    return found


def _test_sets(options: Namespace) -> dict[str, Part]:
    """The data sets of basic expressions that are only tested on."""
    readers: dict[str, tuple[Callable[[Path], Parts], Path | None]] = {
        "CK+": (expressions.ck_plus, options.ck_plus),
        "MMI": (expressions.folder, options.mmi),
        "FER-2013": (expressions.fer_2013, options.fer_2013),
    }
    found = {name: read(home) for name, (read, home) in readers.items() if home is not None}
    for given in options.folder:
        name, equals, home = given.partition("=")
        if not equals:
            raise ValueError(f"--folder must be NAME=DIR, got {given!r}")
        found[name] = expressions.folder(Path(home), name)
    return {
        name: parts.get("test") or parts.get("validation") or parts["train"]
        for name, parts in found.items()
    }


def _recipes(options: Namespace, data: TrainingSet) -> Iterator[Recipe]:
    epochs = options.epochs or data.epochs
    drop_every = max(1, round(data.drop_every * epochs / data.epochs))
    softmax = Recipe(
        *(options.model, options.weights, "softmax", 0.0, 0, epochs, drop_every),
        neck=options.neck,
        size=options.size,
        batch_size=options.batch_size,
    )
    presets = [PRESETS[name] for name in options.preset]
    recipes = [softmax, *(softmax._replace(method=one, weight=weight) for one, weight in presets)]
    paper = softmax._replace(method="paper", weight=PAPER_WEIGHT)
    if "weights" in options.sweep:
        recipes += [paper._replace(weight=weight) for weight in SWEEPS["weights"]]
    if "features" in options.sweep:
        recipes += [paper._replace(feature_dim=int(dim)) for dim in SWEEPS["features"]]
    for recipe in dict.fromkeys(recipes):
        for seed in range(options.seeds):
            yield recipe._replace(seed=seed)
