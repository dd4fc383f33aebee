"""The command line: trains what is missing, then writes page and pictures."""

import os
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from benchmarks.data import expressions, faces
from benchmarks.data.expressions import BASIC, COMPOUND, Part
from benchmarks.harness import Results, make_parser, write
from benchmarks.networks import backbone_classifier
from benchmarks.paper import tables
from benchmarks.paper.runs import Recipe, TrainingSet, run
from benchmarks.training import PAPER_WEIGHT, WEIGHT

# Of the methods, with the weight of each.
PRESETS = {"paper": PAPER_WEIGHT, "simplex": WEIGHT}


def _parser() -> ArgumentParser:
    parser = make_parser("paper", "The paper's experiment, on your files.")
    add = parser.add_argument
    add("--raf-db", type=Path, help="basic expressions, to train on")
    add("--raf-db-compound", type=Path, help="compound expressions, to train on")
    add("--affectnet", type=Path, help="to train on")
    add("--ferplus", type=Path, help="fer2013.csv beside fer2013new.csv, to train on")
    add("--affectnet-order", nargs="+", metavar="CLASS", help="classes of numbers 0, 1, ...")
    tested = "CK+, fer2013.csv, or a folder per class, as MMI, to test on"
    add("--test", nargs="+", default=[], metavar="NAME=PATH", help=tested)
    add("--preset", nargs="+", choices=PRESETS, default=["paper"])
    add("--loss-weights", nargs="+", type=float, help="in place of the presets'")
    add("--seeds", type=int, default=1)
    add("--model", default="resnet18.tv_in1k", help="of timm")
    add("--weights", help='a state dict, or "none"; downloaded by default')
    add("--epochs", type=int, help="in place of the paper's")
    add("--batch-size", type=int, default=100, help="of each process")
    add("--size", type=int, default=224, help="of the pictures, in pixels")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the experiment; `accelerate launch` runs it in parallel."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        training_sets = [*_training_sets(options)]
        if not training_sets:
            given = "--raf-db, --raf-db-compound, --affectnet, --ferplus"
            raise ValueError(f"there is nothing to train on: give one of {given}")
        test_sets = dict(map(_test_set, options.test))
        backbone_classifier(options.model, options.weights, 2)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    names = ("model", "epochs", "batch_size", "size", "affectnet_order")
    settings = {name: getattr(options, name) for name in names} | {
        "weights": options.weights and Path(options.weights).name,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "pictures": {data.name: len(data.training.target) for data in training_sets},
    }
    results = Results(options, "results", settings, accelerator.device.type)
    if accelerator.is_main_process and not options.redraw:
        if options.fresh:
            shutil.rmtree(options.output / "checkpoints", ignore_errors=True)
        results.save()  # the settings, which checkpoints share
    accelerator.wait_for_everyone()
    for data in training_sets:
        accelerator.print(f"{data.name}: {tables.pictures(data)}")
    trainings = [(one, data) for data in training_sets for one in _recipes(options, data)]
    for number, (recipe, data) in enumerate(trainings, 1):
        key = recipe.key(data.name)
        accelerator.print(f"[{number}/{len(trainings)}] {key}", flush=True)
        if key in results.measured or options.redraw:
            continue
        stem = tables.file_name(key)
        checkpoint = options.output / "checkpoints" / f"{stem}.pt"
        others = test_sets if data.class_names is BASIC else {}
        trained = run(recipe, data, others, accelerator, checkpoint, options.workers)
        if accelerator.is_main_process:
            results.once(key, partial(dict, trained.record))
            checkpoint.unlink(missing_ok=True)
            if recipe.seed == 0:
                tables.draw(trained, data.class_names, options.output / f"{stem}.png")
    if accelerator.is_main_process:
        text = tables.page(results, trainings, test_sets)
        write(options.output / "paper.md", text)
        print(f"\n{text}\nWritten to {options.output}")


def _training_sets(options: Namespace) -> Iterator[TrainingSet]:
    """The data sets to train on, with the paper's schedule."""
    compound = partial(expressions.raf_db, class_names=COMPOUND)
    affectnet = partial(expressions.affectnet, order=options.affectnet_order)
    for home, read, name, class_names, epochs, drop_every in (
        (options.raf_db, expressions.raf_db, "RAF-DB basic", BASIC, 60, 20),
        (options.raf_db_compound, compound, "RAF-DB compound", COMPOUND, 60, 20),
        (options.affectnet, affectnet, "AffectNet", BASIC, 20, 5),
        (options.ferplus, faces.ferplus, "FERPlus", BASIC, 60, 20),
    ):
        if home is not None:
            parts = read(home)
            training, reported = parts.get("train"), parts.get("test") or parts.get("validation")
            if training is None or reported is None:
                raise ValueError(f"{home}: {name} needs a part to train on and one to test on")
            identical = expressions.count_identical(reported, training)
            yield TrainingSet(name, training, reported, class_names, epochs, drop_every, identical)


def _test_set(given: str) -> tuple[str, Part]:
    """A data set of basic expressions that is only tested on, with its name."""
    name, equals, path = given.partition("=")
    if not equals:
        raise ValueError(f"--test must be NAME=PATH, got {given!r}")
    home = Path(path)
    if home.suffix == ".csv" or name == "FER-2013":
        parts = faces.fer_2013(home)
    else:
        parts = expressions.ck_plus(home) if name == "CK+" else expressions.folder(home, name)
    return name, parts.get("test") or parts.get("validation") or parts["train"]


def _recipes(options: Namespace, data: TrainingSet) -> Iterator[Recipe]:
    epochs = options.epochs or data.epochs
    drop_every = max(1, round(data.drop_every * epochs / data.epochs))
    shared = (epochs, drop_every, options.size, options.batch_size)
    methods = [("softmax", 0.0)]
    for name in options.preset:
        methods += [(name, weight) for weight in options.loss_weights or [PRESETS[name]]]
    for method, weight in methods:
        for seed in range(options.seeds):
            yield Recipe(options.model, options.weights, method, weight, seed, *shared)
