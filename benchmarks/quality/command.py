"""The command line: trains what is missing, then writes the tables."""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.data import cifar10, fingerprint, intents
from benchmarks.harness import Results, make_parser, write
from benchmarks.quality import tables
from benchmarks.quality.data import DATA, Files
from benchmarks.quality.study import Setting, Study, run

QUICK_SAMPLES = 200


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the study."""
    parser = make_parser("quality", "Does the separate loss help?")
    parser.add_argument("--data", nargs="+", choices=DATA, help="default: all with files")
    for name in Files._fields:
        parser.add_argument(f"--{name}", type=Path, help=f"to train on {name}, see the guide")
    parser.add_argument("--quick", action="store_true", help="little of everything, in minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    files = Files(*(getattr(options, name) for name in Files._fields))
    prints = {}
    try:
        for name, path in files._asdict().items():
            if path is not None:
                reader = cifar10 if name == "cifar10" else intents
                prints[name] = fingerprint(reader.load(path))
    except ValueError as error:
        parser.error(f"--{name} {error}")

    torch.set_num_threads(1)
    studies, environments = [], {}
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for name in _data_sets(parser, options, files):
            settings = {"quick": options.quick, "data": prints.get(DATA[name].needs or "")}
            results = Results(options, name, settings, options.device)
            quick: bool = results.settings["quick"]
            most = QUICK_SAMPLES if quick else None
            train = partial(run, files=files, device=options.device, most=most)
            measure = partial(_measure, results, pool, train)
            study = Study(name, results.measured, measure, quick=quick)
            study.run()
            studies.append(study)
            environments[name] = results.environment
    text = tables.page(studies, environments)
    write(options.output / "tables.md", text)
    print(f"\n{text}\nWritten to {options.output}")


def _data_sets(
    parser: argparse.ArgumentParser, options: argparse.Namespace, files: Files
) -> list[str]:
    """Those that were asked for, or all whose files or results are there."""
    names = []
    for name in options.data or DATA:
        need = DATA[name].needs
        stored = options.redraw and (options.output / f"{name}.json").exists()
        if stored or need is None or getattr(files, need) is not None:
            names.append(name)
        elif options.data:
            parser.error(f"--data {name} needs --{need}")
        else:
            print(f"Without --{need}, {DATA[name].title} is left out.")
    return names


def _measure(
    results: Results,
    pool: ProcessPoolExecutor,
    train: "partial[list[float | None]]",
    settings: list[Setting],
) -> None:
    """Trains what is missing, and stores each result as soon as it is there."""
    missing = {one.key(): one for one in settings if one.key() not in results.measured}
    if results.redraw and missing:
        raise SystemExit(f"{results.path} has no results for {next(iter(missing))}")
    start = time.perf_counter()
    futures = {pool.submit(train, setting): key for key, setting in missing.items()}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            key, figures = futures[future], future.result()
            results.once(key, partial(list, figures))
            minutes = (time.perf_counter() - start) / 60
            share = f"[{number}/{len(missing)}, {minutes:.1f} min]"
            print(f"{share} {key}: {figures[0]:.1f} %", flush=True)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise SystemExit(f"Interrupted: the same command resumes from {results.path}") from None
