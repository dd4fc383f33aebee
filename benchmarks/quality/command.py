"""The command line: runs what is missing, then writes tables and pictures."""

import argparse
import hashlib
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.faces import load
from benchmarks.quality import figures, pictures, runs, tables
from benchmarks.quality.jobs import execute
from benchmarks.quality.settings import FULL, QUICK, DataName, Setting
from benchmarks.quality.study import Record, Study
from benchmarks.report import REDRAW, Results, write


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality", description="Does the separate loss help?"
    )
    kept = add_options(parser, "quality")
    kept.add_argument("--redraw", action="store_true", help=REDRAW)
    options, mark = parse(parser, arguments)
    scale = QUICK if options.quick else FULL
    source = runs.Source(options.data, scale.faces)
    data: tuple[DataName, ...] = ("digits",) if options.data is None else ("digits", "faces")
    if options.data is None:
        print("Without --data, only scikit-learn's digits are run; FER-2013 is not.")

    torch.set_num_threads(1)
    began = time.perf_counter()
    settings = {"scale": scale._asdict(), "faces": mark, "workers": options.workers}
    results = Results(
        options.output / "results.json", settings, fresh=options.fresh, redraw=options.redraw
    )

    def measure(wanted: Iterable[Setting], detailed: bool) -> Mapping[Setting, Record]:
        named = {setting.key(): setting for setting in wanted}
        jobs = {
            name: partial(runs.record, setting, source, detailed) for name, setting in named.items()
        }
        execute(jobs, results, options.workers)
        return {setting: results.measured[name] for name, setting in named.items()}

    names = {name: runs.parts(name, source, 0).class_names for name in data}
    study = Study(scale, data, measure, names)
    study.tune()
    study.run()
    drawn = {f"picture of {setting.key()}": setting for setting in study.pictured()}
    jobs = {name: partial(pictures.plane, setting, source) for name, setting in drawn.items()}
    execute(jobs, results, options.workers)

    text = tables.everything(study, results)
    write(options.output / "tables.md", text)
    figures.draw(study, options.output)
    pictures.draw(
        study, {setting: results.measured[name] for name, setting in drawn.items()}, options.output
    )
    print(f"\n{text}\n{options.output}: {(time.perf_counter() - began) / 60:.1f} min in all")


def add_options(parser: argparse.ArgumentParser, name: str) -> Any:
    """What studies have in common; returns the group of what to do with earlier results."""
    parser.add_argument("--data", type=Path, help="FER-2013: npz, csv or a folder per class")
    parser.add_argument("--quick", action="store_true", help="little of everything, in minutes")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks") / name)
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--fresh", action="store_true", help="drop what --output holds")
    return kept


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, str | None]:
    """The options, and what tells their faces from others."""
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    try:
        return options, None if options.data is None else _fingerprint(options.data)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _fingerprint(path: Path) -> str:
    """Tells one set of faces from another."""
    faces = load(path)
    digest = hashlib.sha256(faces.images.tobytes() + faces.labels.tobytes()).hexdigest()
    return f"{len(faces.labels)} faces, {digest[:12]}"
