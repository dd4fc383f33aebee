"""The command line: trains what is missing, then writes page and pictures."""

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from benchmarks.backbone import Classifier
from benchmarks.expressions import Part
from benchmarks.paper import sets, tables
from benchmarks.paper.runs import Recipe, run
from benchmarks.paper.sets import TrainingSet
from benchmarks.quality.methods import PAPER_WEIGHT, WEIGHT
from benchmarks.report import REDRAW, Results, write

# Of the study's methods, with the weight of each.
PRESETS = {"paper": ("paper", PAPER_WEIGHT), "recommended": ("square", WEIGHT)}
SWEPT = {
    "weights": tuple(tenths / 10 for tenths in range(1, 12)),
    "features": (64, 128, 256, 512, 768, 1024),
}


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the experiment; `accelerate launch` runs it in parallel."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper", description="The paper's experiment, on your files."
    )
    sets.add_options(parser)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["paper"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default="resnet18", help="of torchvision or timm")
    parser.add_argument("--weights", help='a state dict, or "none"; downloaded by default')
    parser.add_argument("--neck", action="store_true", help="BatchNorm1d before the head")
    parser.add_argument("--epochs", type=int, help="in place of the paper's")
    parser.add_argument("--batch-size", type=int, default=100, help="of each process")
    parser.add_argument("--size", type=int, default=224, help="of the pictures, in pixels")
    parser.add_argument("--sweep", nargs="+", choices=SWEPT, default=[], help="Figure 4")
    parser.add_argument("--precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/paper"))
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--fresh", action="store_true", help="drop what --output holds")
    kept.add_argument("--redraw", action="store_true", help=REDRAW)
    options = parser.parse_args(arguments)
    for name in ("seeds", "batch_size", "size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        trained, tested = sets.trained(options), sets.tested(options)
        Classifier(options.model, options.weights, 2)
    except ValueError as error:
        parser.error(str(error))

    accelerator = Accelerator(
        cpu=options.cpu or None,
        mixed_precision=options.precision,
        step_scheduler_with_optimizer=False,
    )
    said = ("model", "neck", "epochs", "batch_size", "size", "precision", "votes")
    results = Results(
        options.output / "results.json",
        {
            **{name: getattr(options, name) for name in said},
            "weights": options.weights and Path(options.weights).name,
            "processes": accelerator.num_processes,
            "pictures": {one.name: len(one.training.target) for one in trained},
        },
        device=accelerator.device.type,
        fresh=options.fresh,
        redraw=options.redraw,
    )
    if options.fresh and accelerator.is_main_process:
        shutil.rmtree(options.output / "checkpoints", ignore_errors=True)
    accelerator.wait_for_everyone()
    jobs = list(_jobs(options, trained))
    for number, (recipe, data) in enumerate(jobs, 1):
        if accelerator.is_main_process:
            print(f"[{number}/{len(jobs)}] {recipe.key(data.name)}", flush=True)
        _once(recipe, data, tested, accelerator, results, options)
    if accelerator.is_main_process:
        text = tables.page(results, jobs, tested)
        write(options.output / "paper.md", text)
        print(f"\n{text}\nWritten to {options.output}")


def _once(
    recipe: Recipe,
    data: TrainingSet,
    tested: Mapping[str, Part],
    accelerator: Accelerator,
    results: Results,
    options: argparse.Namespace,
) -> None:
    key = recipe.key(data.name)
    if key in results.measured or results.redraw:
        return
    checkpoint = options.output / "checkpoints" / f"{tables.file_name(key)}.pt"
    record, found, centers = run(recipe, data, tested, accelerator, checkpoint, options.workers)
    if accelerator.is_main_process:
        results.once(key, partial(dict, record))
        checkpoint.unlink(missing_ok=True)
        if recipe.seed == 0 and recipe.feature_dim is None:
            tables.draw(found, centers, data.class_names, options.output / tables.picture_name(key))
    else:
        results.measured[key] = record


def _jobs(
    options: argparse.Namespace, trained: list[TrainingSet]
) -> Iterator[tuple[Recipe, TrainingSet]]:
    chosen = [("softmax", 0.0), *(PRESETS[name] for name in options.preset)]
    for data in trained:
        recipe = Recipe(
            options.model,
            options.weights,
            "softmax",
            0.0,
            0,
            options.epochs or data.epochs,
            max(1, round(data.drop_every * (options.epochs or data.epochs) / data.epochs)),
            neck=options.neck,
            size=options.size,
            batch_size=options.batch_size,
        )
        usual = [recipe._replace(method=method, weight=weight) for method, weight in chosen]
        swept = []
        if "weights" in options.sweep:
            swept += [recipe._replace(method="paper", weight=weight) for weight in SWEPT["weights"]]
        if "features" in options.sweep:
            swept += [
                recipe._replace(method="paper", weight=PAPER_WEIGHT, feature_dim=int(dim))
                for dim in SWEPT["features"]
            ]
        for one in dict.fromkeys([*usual, *swept]):
            for seed in range(options.seeds):
                yield one._replace(seed=seed), data
