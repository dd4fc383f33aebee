"""The command line: runs what is missing, then writes tables."""

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.beyond import runs, tables
from benchmarks.beyond.data import DataName, Source
from benchmarks.beyond.runs import Setting
from benchmarks.beyond.study import FULL, QUICK, Record, Study
from benchmarks.quality.command import add_options, parse
from benchmarks.quality.jobs import execute
from benchmarks.quality.settings import KINDS
from benchmarks.report import Results, write


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the study."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks beyond", description="Is there a better separation than Eq. 3?"
    )
    add_options(parser, "beyond")
    parser.add_argument("--features", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--only", choices=get_args(DataName), nargs="+", help="data sets")
    options, mark = parse(parser, arguments)
    scale = QUICK if options.quick else FULL
    source = Source(options.data, scale.faces)
    wanted: tuple[DataName, ...] = options.only or get_args(DataName)
    if options.data is None:
        print("Without --data, FER-2013 is not run.")
    data = tuple(name for name in wanted if name != "faces" or options.data is not None)

    torch.set_num_threads(1)
    began = time.perf_counter()
    asked = {"scale": scale._asdict(), "faces": mark}
    results = Results(options.output / "results.json", asked, fresh=options.fresh)

    def measure(settings: Iterable[Setting]) -> Mapping[Setting, Record]:
        named = {setting.key(): setting for setting in settings}
        jobs = {name: partial(runs.record, setting, source) for name, setting in named.items()}
        execute(jobs, results, options.workers)
        return {setting: results.measured[name] for name, setting in named.items()}

    study = Study(scale, data, tuple(options.features), measure)
    study.run()
    text = tables.everything(study, results)
    write(options.output / "tables.md", text)
    write(options.output / "runs.jsonl", _short(study, results))
    print(f"\n{text}\n{options.output}: {(time.perf_counter() - began) / 60:.1f} min in all")


def _short(study: Study, results: Results) -> str:
    """All runs, one a line, with each figure's name once: a third of what `results.json` takes."""
    figures: dict[str, list[str]] = {"tuning": ["accuracy", "seconds"]}
    lines: list[Any] = []
    for setting, run in study.found.items():
        figures.setdefault("tuning" if setting.tuning else setting.data, list(run))
        lines.append([setting.key(), *run.values()])
    head = {"environment": results.environment, "settings": results.settings, "figures": figures}
    return "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in [head, *lines])
