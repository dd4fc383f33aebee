"""The fused kernels on a GPU: what a step costs beside the operators and the compiler.

Counts what a step launches; times a step over classes and over samples as operators, compiled by
torch.compile, and as kernels, beside the bandwidth of a copy; and a ResNet-18 step in bfloat16 at
batch 256. `make test-cuda` compares the values. Writes JSON and a Markdown page. Needs a CUDA GPU
with some 12 GB of free memory, and takes three minutes.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from itertools import product
from statistics import median
from typing import Any

import torch
from torch.profiler import profile

from benchmarks import report
from benchmarks.contenders import Problem, Size
from benchmarks.timing import Step, measure
from separate_loss import SeparateLoss
from separate_loss.ops import dispatch

__all__ = ["main"]

SMALL, LARGE = Size(128, 512, 7), Size(512, 512, 1_000_000)
BETWEEN = (
    Size(1_024, 512, 7),
    Size(4_096, 512, 7),
    Size(256, 512, 10_000),
    Size(4_096, 512, 10_000),
)
FORMS = ("eager", "compiled", "fused")
UPDATES = ("paper", "gradient")
IMAGES, BATCH_SIZE = 224, 256
SECONDS = 0.5  # for each timing
# Passes over the centers that no step can do without: read, read again, write.
PASSES = 3
MOST_LAUNCHES, LEAST_BANDWIDTH, MOST_SHARE = 6, 0.8, 0.01
LEAST_GAIN = 1.1  # of the kernels over the compiler


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, measures what is not yet measured, and writes both files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    report.add_options(parser)
    parser.set_defaults(device="cuda")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not options.redraw:
        if not torch.cuda.is_available():
            parser.error("these figures need a CUDA GPU, and torch finds none here")
        if not dispatch.HAS_TRITON:
            parser.error("the kernels need Triton for CUDA: pip install triton")
    settings = {"sizes": (SMALL, *BETWEEN, LARGE), "images": IMAGES}
    results = report.Results(
        report.output(options, "gpu", ".json"),
        settings,
        device="cpu" if options.redraw else options.device,
        fresh=options.fresh,
        redraw=options.redraw,
    )
    works: dict[str, Callable[[], Any]] = {
        "triton": partial(version, "triton"),
        "bandwidth": partial(_bandwidth, options.device),
        "ResNet-18": partial(_share, options.device, options.threads),
    }
    for (size, update), form in product(_steps(), FORMS):
        works[f"{size} {update} {form}"] = partial(
            _step_of, size, update, form, options.device, options.threads
        )
    for number, (name, work) in enumerate(works.items(), 1):
        results.once(name, work)
        report.progress(number, len(works), name)
    text = _page(results)
    report.write(report.output(options, "gpu", ".md"), text)
    print(text)


def _steps() -> list[tuple[Size, str]]:
    return [*product((SMALL, LARGE), UPDATES), *((size, "paper") for size in BETWEEN)]


@contextmanager
def chosen(form: str) -> Iterator[None]:
    """The kernels, or the eager form for whoever compiles it or not."""
    before, dispatch.CHOICE = dispatch.CHOICE, "fused" if form == "fused" else "eager"
    try:
        yield
    finally:
        dispatch.CHOICE = before


def _bandwidth(device: str) -> float:
    """Bytes per second that a copy of the large centers reads and writes."""
    source = torch.randn(LARGE.num_classes, LARGE.feature_dim, device=device)
    copy = torch.empty_like(source)

    def step() -> None:
        copy.copy_(source)

    return 2 * source.nbytes / measure(step, threads=1, seconds=SECONDS)["median"]


def _build(size: Size, update: str, form: str, device: str) -> Step:
    problem = Problem.draw(size, device)
    criterion = SeparateLoss(
        size.num_classes,
        size.feature_dim,
        center_update=update,  # type: ignore[arg-type]
        center_init="sphere",
        device=device,
    )
    call: Any = torch.compile(criterion, fullgraph=True) if form == "compiled" else criterion

    def step() -> None:
        problem.features.grad = criterion.centers.grad = None
        with chosen(form):
            call(problem.features, problem.target).backward()

    return step


def _step_of(size: Size, update: str, form: str, device: str, threads: int) -> dict[str, Any]:
    """Forward, backward and the centers' update or gradient: seconds, and what it launches."""
    torch._dynamo.reset()
    step = _build(size, update, form, device)
    timing = measure(step, threads=threads, seconds=SECONDS)
    with profile() as profiled:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    kernels = [one for one in profiled.events() if one.device_type.name == "CUDA"]
    return {
        **timing,
        "launches": len(kernels),
        "on device": sum(one.time_range.elapsed_us() for one in kernels) / 1e6,
    }


def _share(device: str, threads: int) -> dict[str, Any]:
    from benchmarks import resnet  # noqa: PLC0415 - slow to import

    with chosen("fused"):
        return resnet.share(
            images=IMAGES,
            batch_size=BATCH_SIZE,
            device=device,
            threads=threads,
            seconds=SECONDS,
            dtype=torch.bfloat16,
        )


def _page(results: report.Results) -> str:
    found = results.measured
    bars: list[list[str]] = []
    rows: list[list[str]] = []

    def hold(what: str, bar: str, measured: str, met: bool | None) -> None:
        bars.append([what, bar, measured, report.verdict(met)])

    whole = found["ResNet-18"]
    share = whole["alone"]["median"] / median(whole["without"])
    met = share <= MOST_SHARE
    ratio = median(whole["with"]) / median(whole["without"])
    hold("ResNet-18: step with the loss / without", "at most 1.01", f"{ratio:.3f}", ratio <= 1.01)
    hold("ResNet-18: loss alone / step", f"at most {MOST_SHARE:.0%}", f"{share:.2%}", met)
    for size, update in _steps():
        forms = {form: found[f"{size} {update} {form}"] for form in FORMS}
        for form, one in forms.items():
            taken = [report.duration(one[key]) for key in ("median", "iqr", "on device")]
            rows.append([f"{size} {update} {form}", *taken, str(one["launches"])])
        fused = forms["fused"]["median"]
        if size == SMALL:
            count = forms["fused"]["launches"]
            seen = count <= MOST_LAUNCHES if count else None
            hold(f"{size} {update}: launches", f"at most {MOST_LAUNCHES}", str(count), seen)
        elif size == LARGE:
            moved = PASSES * 4 * size.num_classes * size.feature_dim
            reached = moved / fused / found["bandwidth"]
            bar = f"at least {LEAST_BANDWIDTH:.0%}"
            met = reached >= LEAST_BANDWIDTH
            hold(f"{size} {update}: bandwidth / that of a copy", bar, f"{reached:.0%}", met)
        for other in ("eager", "compiled"):
            gain = forms[other]["median"] / fused
            bar = f"at least {LEAST_GAIN}"
            hold(f"{size} {update}: {other} / fused", bar, f"{gain:.2f}", gain >= LEAST_GAIN)
    parts = [
        "# The fused kernels on a GPU",
        f"{report.provenance(results.environment)}; Triton {found['triton']}; "
        f"a copy moves {found['bandwidth'] / 1e9:,.0f} GB/s",
        report.table(["", "bar", "measured", ""], bars),
        "The loss alone is not hidden behind other work of the device, as it is within the step. "
        "Times of a step of the loss; the device's are without what Python and the launches cost:",
        report.table(["", "median", "between quartiles", "on the device", "launches"], rows),
    ]
    return "\n\n".join(parts) + "\n"
