"""What every benchmark writes: results that outlive an interruption, and where they come from."""

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import separate_loss

__all__ = [
    "REDRAW",
    "Results",
    "add_options",
    "duration",
    "environment",
    "output",
    "progress",
    "provenance",
    "table",
    "verdict",
    "write",
]

REDRAW = "pages and plots from the figures in --output, measuring nothing"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes: where to run, where to write."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"), help="a directory")
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--fresh", action="store_true", help="drop figures of an earlier run")
    runs.add_argument("--redraw", action="store_true", help=REDRAW)


def output(options: argparse.Namespace, name: str, suffix: str) -> Path:
    """The path of a file that is written, one for each kind of device."""
    directory: Path = options.output
    return directory / f"{name}{'' if options.device == 'cpu' else f'-{options.device}'}{suffix}"


def progress(number: int, total: int, what: str) -> None:
    """A line for a measurement that is done."""
    print(f"[{number}/{total}] {what}", flush=True)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine, threads and date, as JSON takes them."""
    found: dict[str, Any] = {
        "separate_loss": f"{separate_loss.__version__}, sources {_digest()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": None,
        "date": str(date.today()),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _digest() -> str:
    """Tells two states of the package apart, committed or not."""
    found = hashlib.sha256()
    home = Path(separate_loss.__file__).parent
    for path in sorted(home.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def provenance(found: Mapping[str, Any]) -> str:
    """An environment as one line under a table."""
    device = found["gpu"] or f"{found['cpu']}, {found['threads']} threads"
    return (
        f"separate-loss {found['separate_loss']}; torch {found['torch']}, "
        f"Python {found['python']}, NumPy {found['numpy']}; {device}; {found['date']}"
    )


class Results:
    """Measurements by name in a JSON file, which a run that was interrupted goes on from.

    Args:
        path: the file; a directory that is missing is made.
        settings: what the run was asked for, as JSON takes it. Figures of other settings, another
            machine, another version or another state of the package do not mix: the run stops.
        device: what the environment names.
        fresh: forgets what the file holds.
        redraw: measures nothing, and takes figures of any machine, version and state.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        device: str = "cpu",
        fresh: bool = False,
        redraw: bool = False,
    ) -> None:
        self.path = path
        self.redraw = redraw
        # As it comes back from the file.
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.environment = environment(device)
        self.measured: dict[str, Any] = {}
        if redraw and not path.exists():
            raise SystemExit(f"{path} is missing: there is nothing to redraw")
        if path.exists() and not fresh:
            self._go_on(json.loads(path.read_text()))

    def _go_on(self, stored: dict[str, Any]) -> None:
        for kind, now in (("settings", self.settings), ("environment", self.environment)):
            then = stored[kind]
            if self.redraw and kind == "environment":
                self.environment = then
                continue
            for key in sorted({*then, *now} - {"date"}):
                if then.get(key) != now.get(key):
                    raise SystemExit(
                        f"{self.path} holds figures for {key} {then.get(key)!r}, and this run has "
                        f"{now.get(key)!r}: pass --fresh to drop them, or another --output"
                    )
        self.environment["date"] = stored["environment"]["date"]
        self.measured = stored["measured"]

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gave for this name, in this run or in the one that it goes on from.

        `measure` returns what JSON takes, without NaN or infinity: None says that there is none.
        """
        if name not in self.measured:
            if self.redraw:
                raise SystemExit(f"{self.path} has no figures for {name}")
            # Through JSON, so that a fresh result and one read back are the same.
            self.measured[name] = json.loads(json.dumps(measure(), allow_nan=False))
            self.save()
        return self.measured[name]

    def save(self) -> None:
        """Writes the file; `once` does it after each measurement."""
        parts = {"environment": self.environment, "settings": self.settings}
        head = json.dumps(parts, indent=1, allow_nan=False).removesuffix("\n}")
        lines = (
            f"{json.dumps(name)}: {json.dumps(found, allow_nan=False)}"
            for name, found in self.measured.items()
        )
        write(self.path, head + ',\n "measured": {\n' + ",\n".join(lines) + "\n}}\n")


def write(path: Path, text: str) -> None:
    """Writes a file so that an interruption leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(text)
    half.replace(path)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others stand to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def verdict(met: bool | None) -> str:
    """How a bar's line ends; None where it was not measured."""
    return "not measured" if met is None else "**met**" if met else "**not met**"


def duration(seconds: float) -> str:
    """Three digits that count, in a unit that fits."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
