"""A step by the kernels: read the batch and the centers, move the centers, and both gradients.

A step launches `read`, `sums`, `finish`, one assertion, `move` (Eq. 8, or the gradient of the
centers) and `gradient` (of the features); in the simplex form also the Gram matrix of the centers
and its product with them, by cuBLAS.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from separate_loss._batch import Batch, Options, compute_dtype, prepare_batch
from separate_loss._centers import CENTER_LR_PER_SAMPLE
from separate_loss._torch import assert_on_device
from separate_loss._triton import kernels

INTERPRETED = bool(triton.knobs.runtime.interpret)

# The most programs for centers, and how many values, samples and elements of G a program holds.
PROGRAMS, VALUES, TILE, SQUARES = 512, 2048, 64, 8192
# The most values in a block of unit centers, where the Gram matrix is (d, d).
BLOCK_SIZE = 2**25
# Whether a compiled kernel is launched without Triton's look at each argument, which takes 30 us.
direct = True

Arguments = dict[str, Any]
"""The arguments of kernels by their names, which are the same in all kernels."""

# Those that the gradient of the features reads.
KEPT = "features", "target", "rows", "total", "scalars", "ignore_index", "c", "d", "n"


class Plan:
    """Sizes, constants and compiled kernels of the steps of one kind."""

    def __init__(
        self, c: int, d: int, dtype: torch.dtype, form: str, weighted: bool, smoothing: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        wide, width, chosen = dtype == torch.float64, triton.next_power_of_2(d), -(-c // PROGRAMS)
        simplex, self.device = form == "simplex", device
        columns, self.warps = min(max(16, width), 64), min(width // 512, 16)
        self.rows = min(max(1, VALUES // width), triton.next_power_of_2(chosen))
        self.each = -(-chosen // self.rows) * self.rows
        size = max(1, BLOCK_SIZE // (self.each * d)) * self.each if simplex and c >= d else c
        self.ranges = [(start, min(start + size, c)) for start in range(0, c, size)]
        gram_size = min(c, d) ** 2 if simplex else 0
        self.sizes = {
            "c": c, "d": d, "each": self.each, "blocks": -(-c // self.each),
            "column_blocks": -(-d // columns), "gram_size": gram_size,
            "num_squares": -(-gram_size // SQUARES),
        }  # fmt: skip
        self.constants = {
            "ACC": triton.language.float64 if wide else triton.language.float32,
            "TINY": 2.0**-511 if wide else 2.0**-63, "BATCH": 2 * PROGRAMS, "TILE": TILE,
            "ROWS": self.rows, "COLUMNS": columns, "CHUNK": max(1, 4 * VALUES // width),
            "WIDTH": width, "SQUARES": SQUARES, "SIMPLEX": simplex, "WEIGHTED": weighted,
            "E": float(smoothing), "FEW": c <= min(TILE, PROGRAMS),
        }  # fmt: skip
        self.ready: dict[Any, Any] = {}

    def launch(self, kernel: Any, programs: int, given: Arguments, **more: bool) -> None:
        """Launches a kernel. Triton compiles it anew for other types, alignments or integers."""
        arguments = {name: given[name] for name in kernel.arg_names if name in given}
        seen = [
            (one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, Tensor) else one
            for name, one in arguments.items()
            if name not in kernels.VARYING
        ]
        key = (kernel.__name__, *seen, *more.values())
        if ready := self.ready.get(key) if direct else None:
            ready[0][programs, 1, 1](*arguments.values(), *ready[1])
            return
        constants, warps = self.settings(kernel, more)
        options = {"num_warps": warps, "enable_fp_fusion": True}
        binary = kernel[programs,](*arguments.values(), **constants, **options)
        if isinstance(binary, CompiledKernel):
            self.ready[key] = binary, tuple(constants.values())

    def settings(self, kernel: Any, more: dict[str, bool]) -> tuple[dict[str, Any], int]:
        """The constants of a kernel, in its order, and the number of warps."""
        every = more | self.constants
        constants = {name: every[name] for name in kernel.arg_names if name in every}
        return constants, max(self.warps, 4 if kernel in (kernels.read, kernels.gradient) else 8)


plan = lru_cache(maxsize=256)(Plan)


class KernelWork(NamedTuple):
    """What the gradients and the update need of a step."""

    plan: Plan
    batch: Batch  # as given, not converted
    given: Arguments

    def held(self, of_centers: bool) -> "KernelWork":
        """What the backward pass needs; without the centers' gradient they may change before."""
        if of_centers:
            return self
        batch = self.batch._replace(centers=self.given["rows"])  # for their type
        return self._replace(batch=batch, given={name: self.given[name] for name in KEPT})

    def plain(self) -> tuple[Batch, Tensor]:
        """The batch and the expected unit centers (N, d), for the plain formula."""
        features, target, _, _, centers, _, options, _ = self.batch
        c, d, smoothing = self.given["c"], self.given["d"], options.label_smoothing
        of_others = smoothing / c * self.given["total"][d : 2 * d]
        batch = prepare_batch(features, target, centers, options, c)
        return batch, (1 - smoothing) * self.given["rows"] + of_others

    def features_gradient(self, grad: Tensor) -> Tensor:
        """Eq. 5 (N, d), times the norms of the features in the simplex form."""
        out, n = torch.empty_like(self.given["features"]), self.given["n"]
        with torch.cuda.device_of(grad):
            if n:
                self.plan.launch(kernels.gradient, n, self.given | {"grad": grad, "out": out})
        return out

    def centers_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of both terms for the centers (C, d)."""
        centers = self.given["centers"]
        out = torch.empty_like(centers)
        self._move(centers, out, grad, 0.0, GRADIENT=True, PER_SAMPLE=False, START=False)
        return out

    def update_(self, centers: Tensor, center_lr: float | None, *, start_zeros: bool) -> None:
        """Eq. 8, in place."""
        moved = centers.detach().contiguous()  # the centers' memory, unless strides are unusual
        rate = CENTER_LR_PER_SAMPLE if center_lr is None else float(center_lr)
        options = {"PER_SAMPLE": center_lr is None, "START": start_zeros}
        self._move(moved, moved, self.given["scalars"], rate, GRADIENT=False, **options)
        if moved.data_ptr() != centers.data_ptr():
            centers.copy_(moved)
        elif not centers.is_inference():  # autograd learns of changes by PyTorch's operators alone
            torch.autograd.graph.increment_version(centers)

    def _move(
        self, centers: Tensor, out: Tensor, grad: Tensor, rate: float, **constants: bool
    ) -> None:
        p, (c, d) = self.plan, centers.shape
        given = self.given | {"grad": grad, "centers": centers, "out": out, "rate": rate}
        units, product = given["units"], given["gram"]
        for start, end in p.ranges:
            with torch.cuda.device_of(centers):
                if len(p.ranges) > 1:  # only the last block is there
                    units = centers[start:end] * given["of_classes"][start:end, None]
                    units.nan_to_num_(0, 0, 0)
                if self.batch.options.form == "simplex":
                    product = given["gram"] @ units if c < d else units @ given["gram"]
                given |= {"product": product, "first_program": start // p.rows}
                p.launch(kernels.move, -(-(end - start) // p.rows), given, **constants)


def read(
    features: Tensor, target: Tensor, centers: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, KernelWork]:
    """The loss, both terms, the number of centers, and what the gradients and the update need."""
    (n, d), c, tiles = features.shape, len(centers), -(-len(features) // TILE)
    dtype, (form, weight, ignore_index, _, smoothing) = compute_dtype(features, centers), options
    p = plan(c, d, dtype, form, weight is not None, smoothing, features.device)
    x, target, blocks = features.detach().contiguous(), target.contiguous(), p.sizes["blocks"]
    # The unit centers of the samples' classes times the class weights; the sums of all unit centers
    # and of these times their weights; what `finish` notes for the gradients and the update.
    kept = _arrays(x, dtype, rows=n * d, total=2 * d, scalars=5)
    kept["rows"], scalars = kept["rows"][: n * d].view(n, d), kept["scalars"]
    given = {
        **p.sizes, "n": n, "tiles": tiles, "ignore_index": ignore_index,
        "features": x, "target": target, "centers": centers.detach().contiguous(),
        "weight": target if weight is None else weight.contiguous(), **kept,
        **_arrays(
            x, dtype, of_classes=2 * c, partial=2 * blocks * d, numbers=2 * blocks,
            squares=p.sizes["num_squares"], cosines=n, inverses=n, slots=tiles * TILE * d,
            counts=tiles * TILE, in_tiles=tiles * d, everyone=d,
        ),
        "units": scalars, "gram": scalars,  # not read in the paper's form
    }  # fmt: skip
    if form == "simplex":
        given["units"] = x.new_empty(p.ranges[0][1], d, dtype=dtype)
    with torch.cuda.device_of(x):
        for start, end in p.ranges:
            given["first_program"] = first = start // p.each
            p.launch(kernels.read, -(-end // p.each) - first + (n if end == c else 0), given)
            part = given["units"][: end - start]
            if start > 0:
                given["gram"].addmm_(part.T, part)
            elif form == "simplex":
                given["gram"] = part @ part.T if c < d else part.T @ part
        programs = p.sizes["column_blocks"] * (1 + tiles) + p.sizes["num_squares"]
        p.launch(kernels.sums, programs, given)
        loss, terms = x.new_empty((), dtype=dtype), x.new_empty(2, dtype=dtype)
        p.launch(kernels.finish, 1, given | {"loss": loss, "terms": terms})
    assert_on_device(scalars[0], f"target must hold class indices in [0, {c}) or ignore_index")
    work = KernelWork(p, Batch(features, target, None, None, centers, None, options), given)
    return loss, terms[0], terms[1], scalars[3], work


def _arrays(like: Tensor, dtype: torch.dtype, **sizes: int) -> dict[str, Tensor]:
    """Several arrays in one allocation, each at a multiple of 16 values."""
    padded = [-(-size // 16) * 16 for size in sizes.values()]
    parts = like.new_empty(sum(padded), dtype=dtype).split(padded)
    return dict(zip(sizes, parts, strict=True))
