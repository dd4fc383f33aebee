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
from separate_loss._ops import full_precision
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
    """Sizes, constants and compiled kernels of the steps of one kind."""

    def __init__(
        self, c: int, d: int, dtype: torch.dtype, form: str, weighted: bool, smoothing: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        wide, width, chosen = dtype == torch.float64, triton.next_power_of_2(d), -(-c // PROGRAMS)
        columns = min(max(16, width), 64)
        simplex, self.device = form == "simplex", device
        self.rows = min(max(1, VALUES // width), triton.next_power_of_2(chosen))
        self.each = -(-chosen // self.rows) * self.rows
        self.blocks, self.column_blocks = -(-c // self.each), -(-d // columns)
        size = max(1, BLOCK_SIZE // (self.each * d)) * self.each if simplex and c >= d else c
        self.ranges = [(start, min(start + size, c)) for start in range(0, c, size)]
        self.gram_size = min(c, d) ** 2 if simplex else 0
        self.num_squares, self.warps = -(-self.gram_size // SQUARES), min(width // 512, 16)
        self.constants = {
            "ACC": triton.language.float64 if wide else triton.language.float32,
            "TINY": 2.0**-511 if wide else 2.0**-63, "BATCH": 2 * PROGRAMS, "TILE": TILE,
            "ROWS": self.rows, "COLUMNS": columns, "CHUNK": max(1, 4 * VALUES // width),
            "WIDTH": width, "SQUARES": SQUARES, "SIMPLEX": simplex, "WEIGHTED": weighted,
            "E": float(smoothing), "FEW": c <= min(TILE, PROGRAMS),
        }  # fmt: skip
        self.ready: dict[Any, Any] = {}

    def launch(
        self, kernel: Any, programs: int, fixed: tuple[Any, ...], *varying: Any, **more: bool
    ) -> None:
        """Launches a kernel. Triton compiles it anew for other types, alignments or integers.

        It does not for other `varying` ones.
        """
        seen = [
            (one.dtype, one.data_ptr() % 16 == 0) if isinstance(one, Tensor) else one
            for one in fixed
        ]
        key = (kernel.__name__, *seen, *more.values())
        if ready := self.ready.get(key) if direct else None:
            ready[0][programs, 1, 1](*fixed, *varying, *ready[1])
            return
        constants, warps = self.settings(kernel, more)
        binary = kernel[programs,](
            *fixed, *varying, **constants, num_warps=warps, enable_fp_fusion=True
        )
        last = kernel.arg_names[len(fixed) + len(varying) :]
        if isinstance(binary, CompiledKernel) and last == list(constants):
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
    options: Options
    features: Tensor  # (N, d)
    target: Tensor
    weight: Tensor  # the class weights, or a tensor that is not read
    centers: Tensor | None
    num_classes: int
    rows: Tensor  # the unit centers of the samples' classes, (N, d)
    total: Tensor  # sums of the unit centers, and of these times their weights, (2, d)
    scalars: Tensor  # labels in range; 1 / sum of weights; samples that are finite; centers
    # Of `move`; the last two are a block of unit centers and the Gram matrix, in the simplex form.
    by_class: tuple[Tensor, ...] | None

    def held(self, features: Tensor, centers: Tensor | None) -> "KernelWork":
        """What the backward pass needs; without the centers' gradient they may change before."""
        by_class = None if centers is None else self.by_class
        return self._replace(features=features, centers=centers, by_class=by_class)

    def plain(self) -> tuple[Batch, Tensor]:
        """The batch and the expected unit centers (N, d), for the plain formula."""
        (n, d), smoothing = self.features.shape, self.options.label_smoothing
        centers = self.centers
        if centers is None:  # only sizes are read
            centers = self.rows.new_empty(self.num_classes, d, device="meta")
        batch = prepare_batch(self.features, self.target, centers, self.options)
        expected = (1 - smoothing) * self.rows[: n * d].view(n, d)
        if batch.options.weight is not None:
            expected *= batch.options.weight.index_select(0, batch.target).unsqueeze(-1)
        return batch, expected + smoothing / self.num_classes * self.total[d : 2 * d]

    def features_gradient(self, grad: Tensor) -> Tensor:
        """Eq. 5 (N, d), times the norms of the features in the simplex form."""
        features = self.features.detach().contiguous()
        out, (n, d) = torch.empty_like(features), features.shape
        given = features, self.target, self.weight, self.rows, self.total, self.scalars, out
        sizes = self.num_classes, d, self.options.ignore_index
        with torch.cuda.device_of(grad):
            if n:
                self.plan.launch(kernels.gradient, n, (grad, *given, *sizes), n)
        return out

    def centers_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of both terms for the centers (C, d)."""
        assert self.centers is not None
        centers = self.centers.detach().contiguous()
        out = torch.empty_like(centers)
        self._move(centers, out, grad, 0.0, GRADIENT=True, PER_SAMPLE=False, START=False)
        return out

    def update_(self, centers: Tensor, center_lr: float | None, *, start_zeros: bool) -> None:
        """Eq. 8, in place."""
        moved = centers.detach().contiguous()  # the centers' memory, unless strides are unusual
        rate = CENTER_LR_PER_SAMPLE if center_lr is None else float(center_lr)
        options = {"PER_SAMPLE": center_lr is None, "START": start_zeros}
        self._move(moved, moved, self.scalars, rate, GRADIENT=False, **options)
        if moved.data_ptr() != centers.data_ptr():
            centers.copy_(moved)
        elif not centers.is_inference():  # autograd learns of changes by PyTorch's operators alone
            torch.autograd.graph.increment_version(centers)

    def _move(
        self, centers: Tensor, out: Tensor, grad: Tensor, rate: float, **constants: bool
    ) -> None:
        assert self.by_class is not None
        of_classes, slots, counts, everyone, units, gram = self.by_class
        p, (c, d), n, product = self.plan, centers.shape, len(self.features), gram
        for start, end in p.ranges:
            with full_precision(centers.device.type), torch.cuda.device_of(centers):
                if len(p.ranges) > 1:  # only the last block is there
                    part = units[: end - start]
                    torch.mul(centers[start:end], of_classes[start:end, None], out=part)
                    part.nan_to_num_(0, 0, 0)
                if p.gram_size:
                    product = gram @ units if c < d else units[: end - start] @ gram
                fixed = (
                    grad, self.target, centers, out, self.weight, product, of_classes, self.total,
                    slots, counts, everyone, self.scalars, c, d,
                )  # fmt: skip
                varying = n, -(-n // TILE), start // p.rows, rate
                p.launch(kernels.move, -(-(end - start) // p.rows), fixed, *varying, **constants)


def read(
    features: Tensor, target: Tensor, centers: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, KernelWork]:
    """The loss, both terms, the number of centers, and what the gradients and the update need."""
    (n, d), c, tiles = features.shape, len(centers), -(-len(features) // TILE)
    dtype, (form, weight, ignore_index, _, smoothing) = compute_dtype(features, centers), options
    p = plan(c, d, dtype, form, weight is not None, smoothing, features.device)
    blocks = p.blocks
    x, target, vectors = features.detach().contiguous(), target.contiguous(), centers.detach()
    vectors, own = vectors.contiguous(), target if weight is None else weight.contiguous()
    loss, terms = x.new_empty((), dtype=dtype), x.new_empty(2, dtype=dtype)
    rows, total, scalars = _arrays(x, dtype, n * d, 2 * d, 5)
    of_classes, partial, numbers, squares = _arrays(
        x, dtype, 2 * c, 2 * blocks * d, 2 * blocks, p.num_squares
    )
    cosines, inverses, slots, counts, in_tiles, everyone = _arrays(
        x, dtype, n, n, tiles * TILE * d, tiles * TILE, tiles * d, d
    )
    fixed: tuple[Any, ...]
    gram = units = loss  # not read in the paper's form
    if p.gram_size:
        units = x.new_empty(p.ranges[0][1], d, dtype=dtype)
    with full_precision(x.device.type), torch.cuda.device_of(x):
        for start, end in p.ranges:
            first = start // p.each
            programs = -(-end // p.each) - first + (n if end == c else 0)
            fixed = (
                x, target, vectors, own, units, rows, cosines, inverses, of_classes, partial,
                numbers, c, d, ignore_index, blocks, p.each,
            )  # fmt: skip
            p.launch(kernels.read, programs, fixed, n, first)
            if p.gram_size:
                part = units[: end - start]
                if start > 0:
                    gram.addmm_(part.T, part)
                else:
                    gram = part @ part.T if c < d else part.T @ part
        fixed = (
            x, target, gram, cosines, inverses, of_classes, partial, total, squares, slots, counts,
            in_tiles, c, d, ignore_index, blocks, p.gram_size, p.column_blocks,
        )  # fmt: skip
        programs = p.column_blocks * (1 + tiles) + p.num_squares
        p.launch(kernels.sums, programs, fixed, n, tiles)
        fixed = (
            target, own, cosines, numbers, total, squares, in_tiles, everyone, loss, terms, scalars,
            c, d, ignore_index, blocks, p.num_squares,
        )  # fmt: skip
        p.launch(kernels.finish, 1, fixed, n, tiles)
    assert_on_device(scalars[0], f"target must hold class indices in [0, {c}) or ignore_index")
    left = of_classes, slots, counts, everyone, units, gram
    work = KernelWork(p, options, features, target, own, centers, c, rows, total, scalars, left)
    return loss, terms[0], terms[1], scalars[3], work


def _arrays(like: Tensor, dtype: torch.dtype, *sizes: int) -> tuple[Tensor, ...]:
    """Several arrays in one allocation, each at a multiple of 16 values."""
    padded = [-(-size // 16) * 16 for size in sizes]
    parts: tuple[Tensor, ...] = like.new_empty(sum(padded), dtype=dtype).split(padded)
    return parts
