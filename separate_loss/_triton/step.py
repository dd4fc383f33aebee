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


class Plan:
    """Sizes, constants and compiled kernels of the steps of one kind.

    Arguments of kernels have names, which mean the same in all kernels.
    """

    def __init__(
        self, c: int, d: int, dtype: torch.dtype, form: str, weighted: bool, smoothing: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        wide, simplex, width = dtype == torch.float64, form == "simplex", triton.next_power_of_2(d)
        # A program reads `each` centers, ROWS at a time.
        chosen, many = -(-c // PROGRAMS), max(1, VALUES // width)
        rows, chunk = min(many, triton.next_power_of_2(chosen)), max(1, 4 * VALUES // width)
        each = -(-chosen // rows) * rows
        size = max(1, BLOCK_SIZE // (each * d)) * each if simplex and c >= d else c
        self.ranges = [(start, min(start + size, c)) for start in range(0, c, size)]
        tile, columns = (16, 16) if wide else (TILE, 64)
        gram_size = min(c, d) ** 2 if simplex else 0
        self.values = {
            "c": c, "d": d, "each": each, "blocks": -(-c // each), "gram_size": gram_size,
            "column_blocks": -(-d // columns), "num_squares": -(-gram_size // SQUARES),
            "ACC": triton.language.float64 if wide else triton.language.float32,
            "TINY": 2.0**-511 if wide else 2.0**-63, "ROWS": rows, "CHUNK": chunk, "WIDTH": width,
            "TILES": min(tile // 2, chunk if rows == 1 else many), "TILE": tile, "COLUMNS": columns,
            "BATCH": 2 * PROGRAMS, "SQUARES": SQUARES, "SIMPLEX": simplex, "WEIGHTED": weighted,
            "E": float(smoothing), "GRADIENT": False, "PER_SAMPLE": False, "START": False,
        }  # fmt: skip
        self.device = device  # binaries are loaded on one device
        self.ready: dict[Any, Any] = {}

    def launch(self, kernel: Any, programs: int, given: dict[str, Any]) -> None:
        """Launches a kernel. Triton compiles it anew for other types, alignments or integers."""
        every = self.values | given
        arguments = {name: every[name] for name in kernel.arg_names}
        seen = [
            (one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, Tensor) else one
            for name, one in arguments.items()
            if name not in kernels.VARYING
        ]
        key = (kernel.__name__, *seen)
        with torch.cuda.device_of(next(iter(arguments.values()))):
            if direct and key in self.ready:
                self.ready[key][programs, 1, 1](*arguments.values())
                return
            least = 4 if kernel in (kernels.read, kernels.gradient) else 8
            warps = max(least, min(self.values["WIDTH"] // 512, 16))
            binary = kernel[programs,](**arguments, num_warps=warps, enable_fp_fusion=True)
        if binary is not None:  # the interpreter has none
            self.ready[key] = binary


plan = lru_cache(maxsize=256)(Plan)


class KernelWork(NamedTuple):
    """What the gradients and the update need of a step."""

    plan: Plan
    batch: Batch  # as given, not converted
    given: dict[str, Any]

    def held(self, of_centers: bool) -> "KernelWork":
        """What the backward pass needs; without the centers' gradient they may change before."""
        if of_centers:
            return self
        batch = self.batch._replace(centers=self.given["rows"])  # for their type
        names = kernels.gradient.arg_names
        return self._replace(batch=batch, given={k: v for k, v in self.given.items() if k in names})

    def plain(self) -> tuple[Batch, Tensor]:
        """The batch and the expected unit centers (N, d), for the plain formula."""
        features, target, _, _, centers, _, options, _ = self.batch
        c, d, smoothing = self.plan.values["c"], centers.shape[1], options.label_smoothing
        of_others = smoothing / c * self.given["total"][d : 2 * d]
        batch = prepare_batch(features, target, centers, options, c)
        return batch, (1 - smoothing) * self.given["rows"] + of_others

    def features_gradient(self, grad: Tensor) -> Tensor:
        """Eq. 5 (N, d), times the norms of the features in the simplex form."""
        out = torch.empty_like(self.given["features"])
        if len(out):
            self.plan.launch(kernels.gradient, len(out), self.given | {"grad": grad, "out": out})
        return out

    def centers_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of both terms for the centers (C, d)."""
        centers = self.given["centers"]
        out = torch.empty_like(centers)
        self._move(centers, out=out, grad=grad, rate=0.0, GRADIENT=True)
        return out

    def update_(self, centers: Tensor, center_lr: float | None, *, start_zeros: bool) -> None:
        """Eq. 8, in place."""
        moved = centers.detach().contiguous()  # the centers' memory, unless strides are unusual
        rate = CENTER_LR_PER_SAMPLE if center_lr is None else float(center_lr)
        constants = {"PER_SAMPLE": center_lr is None, "START": start_zeros}
        self._move(moved, out=moved, grad=self.given["scalars"], rate=rate, **constants)
        if moved.data_ptr() != centers.data_ptr():
            centers.copy_(moved)
        elif not centers.is_inference():  # autograd learns of changes by PyTorch's operators alone
            torch.autograd.graph.increment_version(centers)

    def _move(self, centers: Tensor, **more: Any) -> None:
        p, (c, d), rows = self.plan, centers.shape, self.plan.values["ROWS"]
        units, gram, inverses = (self.given[name] for name in ("units", "gram", "of_classes"))
        given = self.given | more | {"centers": centers, "product": gram}
        for start, end in p.ranges:
            if len(p.ranges) > 1:  # only the last block is there
                units = (centers[start:end] * inverses[start:end, None]).nan_to_num_(0, 0, 0)
            if p.values["SIMPLEX"]:
                given["product"] = gram @ units if c < d else units @ gram
            given["first_program"] = start // rows
            p.launch(kernels.move, -(-(end - start) // rows), given)


def read(
    features: Tensor, target: Tensor, centers: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, KernelWork]:
    """The loss, both terms, the number of centers, and what the gradients and the update need."""
    (n, d), c, (form, weight, ignore_index, _, smoothing) = features.shape, len(centers), options
    x, dtype = features.detach().contiguous(), compute_dtype(features, centers)
    p = plan(c, d, dtype, form, weight is not None, smoothing, features.device)
    values, tiles, each = p.values, -(-n // p.values["TILE"]), p.values["each"]
    loss, terms, scalars = (x.new_empty(size, dtype=dtype) for size in ((), 2, 7))
    given: dict[str, Any] = {
        "n": n, "ignore_index": ignore_index, "features": x, "target": target.contiguous(),
        "weight": target if weight is None else weight.contiguous(),
        "centers": centers.detach().contiguous(),
        # The unit centers of the samples' classes times the class weights; the sums of all unit
        # centers and of these times their weights, how many are not zero, the sum of the weights.
        "rows": x.new_empty(n, d, dtype=dtype), "total": x.new_empty(2 * d + 2, dtype=dtype),
        "scalars": scalars,  # what `finish` finds
        "units": scalars, "gram": scalars,  # not read in the paper's form
        **_arrays(
            x, dtype, of_classes=2 * c, partial=values["blocks"] * (2 * d + 2), cosines=n,
            inverses=n, squares=values["num_squares"], slots=tiles * values["TILE"] * d,
            in_tiles=tiles * d, everyone=d,
        ),
    }  # fmt: skip
    if form == "simplex":
        given["units"] = x.new_empty(p.ranges[0][1], d, dtype=dtype)
    for start, end in p.ranges:
        given["first_program"] = first = start // each
        p.launch(kernels.read, -(-end // each) - first + (n if end == c else 0), given)
        units = given["units"][: end - start]
        if start > 0:
            given["gram"].addmm_(units.T, units)
        elif form == "simplex":
            given["gram"] = units @ units.T if c < d else units.T @ units
    p.launch(kernels.sums, values["column_blocks"] * (3 + tiles) + values["num_squares"], given)
    p.launch(kernels.finish, 1, given | {"loss": loss, "terms": terms})
    assert_on_device(scalars[0], f"target must hold class indices in [0, {c}) or ignore_index")
    work = KernelWork(p, Batch(features, target, None, None, centers, weight, options), given)
    return loss, terms[0], terms[1], scalars[3], work


def _arrays(like: Tensor, dtype: torch.dtype, **sizes: int) -> dict[str, Tensor]:
    """Several arrays in one allocation, each at a multiple of 16 values."""
    padded = [-(-size // 16) * 16 for size in sizes.values()]
    parts = like.new_empty(sum(padded), dtype=dtype).split(padded)
    return dict(zip(sizes, parts, strict=True))
