"""The command line: trains what is missing, then writes the tables."""

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import mobilenet
from benchmarks.quality import data, tables
from benchmarks.quality.jobs import execute
from benchmarks.quality.runs import Setting, run
from benchmarks.quality.study import Study
from benchmarks.report import REDRAW, Results, write

QUICK_SAMPLES = 200
NEEDS = {"faces": ("faces",), "pretrained": ("faces", "weights")}


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the study."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks quality", description="Does the separate loss help?"
    )
    parser.add_argument(
        "--data", nargs="+", choices=data.DATA, help="of all for which there are files by default"
    )
    parser.add_argument("--faces", type=Path, help="FER-2013: npz, csv or a folder per class")
    parser.add_argument("--weights", type=Path, help=f"torchvision's {mobilenet.FILE}")
    parser.add_argument("--quick", action="store_true", help="little of everything, in minutes")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/quality"))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--fresh", action="store_true", help="drop what --output holds")
    kept.add_argument("--redraw", action="store_true", help=REDRAW)
    options = parser.parse_args(arguments)
    names = _names(parser, options)
    mark = None
    try:
        if options.faces is not None:
            mark = data.fingerprint(options.faces)
        if options.weights is not None:
            mobilenet.check(options.weights)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))

    torch.set_num_threads(1)
    began = time.perf_counter()
    place = data.Place(options.faces, options.weights)
    studies, environments = [], {}
    pool = None
    if options.workers > 1 and not options.redraw:
        pool = ProcessPoolExecutor(options.workers, get_context("spawn"))
    for name in names:
        path = options.output / f"{name}.json"
        settings = {"quick": options.quick, "faces": mark if name in NEEDS else None}
        if options.redraw and path.exists():
            settings = json.loads(path.read_text())["settings"]
        results = Results(
            path,
            settings,
            device=options.device,
            fresh=options.fresh,
            redraw=options.redraw,
        )
        measure = partial(_measure, results, pool, place, options)
        study = Study(name, results.measured, measure, quick=options.quick)
        study.run()
        studies.append(study)
        environments[name] = results.environment
    if pool is not None:
        pool.shutdown()
    text = tables.page(studies, environments)
    write(options.output / "tables.md", text)
    print(f"\n{text}\n{options.output}: {(time.perf_counter() - began) / 60:.1f} min in all")


def _measure(
    results: Results,
    pool: Executor | None,
    place: data.Place,
    options: argparse.Namespace,
    wanted: Iterable[Setting],
) -> None:
    if results.redraw:
        missing = {one.key(): one for one in wanted if one.key() not in results.measured}
        needed = [key for key, one in missing.items() if one.brief]
        if needed:
            raise SystemExit(f"{results.path} has no figures for {needed[0]}")
        if missing:
            print(f"{results.path} lacks {len(missing)} runs: their rows have fewer seeds")
        return
    jobs = {
        setting.key(): partial(
            run, setting, place, options.device, QUICK_SAMPLES if options.quick else None
        )
        for setting in wanted
    }
    execute(jobs, results, pool)


def _names(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    names = []
    for name in options.data or data.DATA:
        missing = [need for need in NEEDS.get(name, ()) if getattr(options, need) is None]
        there = (options.output / f"{name}.json").exists()
        if not missing or (options.redraw and there):
            names.append(name)
        elif options.data:
            parser.error(f"--data {name} needs --{missing[0]}")
        else:
            print(f"Without --{missing[0]}, {data.DATA[name].title} is left out.")
    return names
