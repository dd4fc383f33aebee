"""What the benchmarks share: options, stored results, timing, tables and figures."""

import hashlib
import io
import json
import math
import os
import platform
import re
import subprocess
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student  # type: ignore[import-untyped]

import separate_loss


def make_parser(command: str, text: str | None, *, timing: bool = False) -> ArgumentParser:
    """A parser with the options that benchmarks share, and those of timings."""
    parser = ArgumentParser(prog=f"python -m benchmarks {command}", description=text)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks", command))
    stored = parser.add_mutually_exclusive_group()
    stored.add_argument("--fresh", action="store_true", help="drop the results in --output")
    stored.add_argument("--redraw", action="store_true", help="write pages and plots from them")
    if timing:
        parser.add_argument("--quick", action="store_true", help="small sizes, briefly")
    return parser


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine, threads and date."""
    return {
        "separate_loss": f"{separate_loss.__version__}, sources {_source_digest()}",
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "backend": os.environ.get("SEPARATE_LOSS_BACKEND"),
        "date": str(date.today()),
    }


def _source_digest() -> str:
    """Tells two states of the package apart."""
    paths = sorted(Path(separate_loss.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def _commit() -> str | None:
    """Of a clone; None elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", path.read_text()) if path.exists() else []
    return str(models[0]) if models else platform.processor() or platform.machine()


def provenance(found: Mapping[str, Any]) -> str:
    """An environment as one line of a page."""
    device = found["gpu"] or f"{found['cpu']}, {found['threads']} threads"
    device += f", backend {found['backend']}" if found.get("backend") else ""
    package = found["separate_loss"].split(", sources")[0]
    package += f" at commit {found['commit']}" if found.get("commit") else ""
    versions = f"torch {found['torch']}, Python {found['python']}, NumPy {found['numpy']}"
    date = found["date"] + found.get("note", "")
    return f"separate-loss {package}; {versions}; {device}; {date}"


class Results:
    """Measurements by name in `options.output`, from which an interrupted run resumes.

    Results of other settings, another machine or another state of the package are refused, or
    dropped with `options.fresh`. With `options.redraw` they are only read, with their settings.
    """

    def __init__(
        self, options: Namespace, name: str, settings: Mapping[str, Any], device: str
    ) -> None:
        self.path: Path = options.output / f"{name}.json"
        self.redraw: bool = options.redraw
        if self.redraw and not self.path.exists():
            raise SystemExit(f"{self.path} is missing: there is nothing to redraw")
        now: dict[str, Any] = {}
        if not self.redraw:
            # Through JSON, so that settings compare equal to stored ones.
            settings = json.loads(json.dumps(settings))
            now = {"environment": environment(device), "settings": settings}
        stored: dict[str, Any] = {**now, "measured": {}}
        if self.path.exists() and not options.fresh:
            stored = json.loads(self.path.read_text())
        for kind, key in ((kind, key) for kind, found in now.items() for key in found):
            then, new = stored[kind].get(key), now[kind][key]
            if key not in {"date", "commit"} and then != new:
                raise SystemExit(
                    f"{self.path} holds results for {key} {then!r}, and this run has {new!r}: "
                    "pass --fresh to drop them, or another --output"
                )
        self.environment, self.settings = stored["environment"], stored["settings"]
        self.measured: dict[str, Any] = stored["measured"]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The stored result of this name; measured and stored where there is none."""
        if name not in self.measured:
            if self.redraw:
                raise SystemExit(f"{self.path} has no results for {name}")
            self.measured[name] = json.loads(json.dumps(measure(), allow_nan=False))
            self.save()
        return self.measured[name]

    def save(self) -> None:
        """Writes the file, one measurement a line."""
        parts = {"environment": self.environment, "settings": self.settings}
        head = json.dumps(parts, indent=1, allow_nan=False).removesuffix("\n}")
        lines = (f"{json.dumps(name)}: {json.dumps(one)}" for name, one in self.measured.items())
        write(self.path, head + ',\n "measured": {\n' + ",\n".join(lines) + "\n}}\n")


def write(path: Path, text: str) -> None:
    """Writes a file as a whole: an interruption leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column is text, the others are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def format_time(seconds: float) -> str:
    """Three significant digits in s, ms or us."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def format_memory(size: float) -> str:
    """Three significant digits in MiB or GiB."""
    return f"{size / 2**30:,.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"


Interval = tuple[float, float, float]  # mean, low, high


def paired_interval(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Student's 95 % interval of the mean of first - second, over two pairs or more."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    mean, count = fmean(differences), len(differences)
    half = student.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
    return mean, mean - half, mean + half


def is_below(first: Sequence[float], second: Sequence[float]) -> float:
    """The p-value of "first is below second on average", paired."""
    mean, low, _ = paired_interval(first, second)
    error = (mean - low) / student.ppf(0.975, len(first) - 1)
    return float(student.cdf(mean / error, len(first) - 1)) if error else float(mean >= 0)


def format_interval(interval: Interval | None) -> str:
    """As a table's cell."""
    return "-" if interval is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval)


def format_spread(values: Sequence[float | None], digits: int, *, deviation: bool = True) -> str:
    """Mean and standard deviation; "-" where nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{fmean(known):.{digits}f}"
    return f"{mean} ± {stdev(known):.{digits}f}" if deviation and len(known) > 1 else mean


def save_svg(figure: Figure, path: Path) -> None:
    """Writes a figure on white, as text that depends on the drawn values only."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "separate-loss", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, facecolor="white")
    write(path, text.getvalue())
