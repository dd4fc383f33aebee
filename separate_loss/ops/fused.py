"""The step under class indices in four Triton kernels, registered with torch.library.

Serves the mean reduction without class weights; `dispatch` says when. Values, gradients and new
centers are those of `eager`, computed in float32, or in float64 where an input is. A step launches
`read` (centers and batch), `finish` (both terms), `features_gradient`, and `move` for the new
centers or for their gradient.

What `read` leaves for the others, beside the loss:

- numbers (5,): intra, inter, 1 / samples that count, 1 / those of them that are finite, and 1 if
  all labels are in range;
- rows (N, d): the unit centers of the samples' classes, as centers may move before backward;
- samples (2, N): cosines and inverse norms; classes (2, C): inverse norms and whether a class is in
  the batch; total (d,): the sum of the unit centers.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from separate_loss._torch import assert_on_device, under_vmap
from separate_loss.ops import eager, kernels

INTERPRETED = bool(triton.knobs.runtime.interpret)

# Programs among which few centers are spread, and values that a program holds of many.
PROGRAMS, TILE = 1024, 2048
BATCH = 1024
# Labels that a program looks at together before it looks at them one by one.
LABELS = 32


def _launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    if programs == 0:
        return
    device = next(value for value in arguments if isinstance(value, Tensor))
    with torch.cuda.device_of(device):
        kernel[(programs,)](*arguments, **constants)


@cache
def works_on(device: torch.device) -> bool:
    """Whether kernels can be built and started on a GPU; warns once where Triton fails."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        sample = torch.ones(1, 2, device=device)
        _read(sample, torch.zeros(1, dtype=torch.long, device=device), sample.repeat(2, 1), -100)
    except Exception as error:  # compilers, linkers and drivers raise what they like
        warnings.warn(
            f"separate_loss goes without its kernels, as Triton cannot build them here: {error}",
            stacklevel=2,
        )
        return False
    return True


def _form(computed: Tensor, d: int) -> dict[str, Any]:
    width = triton.next_power_of_2(d)
    wide = computed.dtype == torch.float64
    return {
        "ACC": triton.language.float64 if wide else triton.language.float32,
        "WIDTH": width,
        "num_warps": min(max(4, width // 512), 16),
        "enable_fp_fusion": True,
    }


def _rows(num_classes: int, form: dict[str, Any]) -> dict[str, Any]:
    """How many centers a program holds at a time, and what counts as zero."""
    few = triton.next_power_of_2(triton.cdiv(num_classes, PROGRAMS))
    tiny = 2.0**-511 if form["ACC"] == triton.language.float64 else 2.0**-63
    return {**form, "ROWS": min(max(1, TILE // form["WIDTH"]), few), "TINY": tiny}


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(features: Tensor, centers: Tensor) -> Six:
    """Empty: loss, numbers, rows, samples, classes, total."""
    dtype = torch.promote_types(features.dtype, centers.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    (num_samples, d), num_classes = features.shape, centers.shape[0]
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(5, dtype=dtype),
        features.new_empty(num_samples, d, dtype=dtype),
        features.new_empty(2, num_samples, dtype=dtype),
        features.new_empty(2, num_classes, dtype=dtype),
        features.new_empty(d, dtype=dtype),
    )


def _read(features: Tensor, target: Tensor, centers: Tensor, ignore_index: int) -> Six:
    outputs = loss, numbers, rows, samples, classes, total = _outputs(features, centers)
    features, target, centers = features.contiguous(), target.contiguous(), centers.contiguous()
    (num_samples, d), num_classes = features.shape, centers.shape[0]
    form = _form(total, d)
    several = _rows(num_classes, form)
    each = triton.cdiv(triton.cdiv(num_classes, PROGRAMS), several["ROWS"]) * several["ROWS"]
    blocks = triton.cdiv(num_classes, each)
    partial = total.new_empty(blocks * (d + 1))
    sizes = num_samples, num_classes, d, ignore_index, blocks
    _launch(
        kernels.read, blocks + num_samples,
        features, target, centers, partial, classes, samples, rows, *sizes, each, **several,
    )  # fmt: skip
    form |= {"ROWS": max(1, 4 * TILE // form["WIDTH"]), "num_warps": 2 * form["num_warps"]}
    _launch(
        kernels.finish, 1,
        target, partial, samples, classes, total, loss, numbers, *sizes, BATCH=BATCH, **form,
    )  # fmt: skip
    return outputs


def _features_gradient(
    grad: Tensor, features: Tensor, target: Tensor, numbers: Tensor, rows: Tensor, samples: Tensor,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    features, target = features.contiguous(), target.contiguous()
    out = torch.empty_like(features)
    num_samples, d = features.shape
    _launch(
        kernels.features_gradient, num_samples,
        grad, features, target, samples, rows, numbers, out, num_samples, d, ignore_index,
        **_form(rows, d),
    )  # fmt: skip
    return out


def _move(
    grad: Tensor, features: Tensor, target: Tensor, centers: Tensor, numbers: Tensor,
    samples: Tensor, classes: Tensor, total: Tensor, out: Tensor, ignore_index: int,
    rate: float | None = 0.0, *, paper: bool = False, start: bool = False,
) -> None:  # fmt: skip
    features, target = features.contiguous(), target.contiguous()
    num_classes, d = centers.shape
    several = _rows(num_classes, _form(total, d))
    _launch(
        kernels.move, triton.cdiv(num_classes, several["ROWS"]),
        grad, features, target, centers, samples, classes, total, numbers, out,
        features.shape[0], num_classes, d, ignore_index,
        eager.RATE_PER_SAMPLE if rate is None else rate,
        PER_SAMPLE=rate is None, PAPER=paper, START=start, LABELS=LABELS, **several,
    )  # fmt: skip


def _centers_gradient(
    grad: Tensor, features: Tensor, target: Tensor, centers: Tensor, numbers: Tensor,
    samples: Tensor, classes: Tensor, total: Tensor, ignore_index: int,
) -> Tensor:  # fmt: skip
    centers = centers.contiguous()
    out = torch.empty_like(centers)
    _move(grad, features, target, centers, numbers, samples, classes, total, out, ignore_index)
    return out


def _move_centers(
    centers: Tensor, features: Tensor, target: Tensor, numbers: Tensor, samples: Tensor,
    classes: Tensor, total: Tensor, ignore_index: int, rate: float | None, start: bool,
) -> None:  # fmt: skip
    moved = centers.contiguous()  # The centers themselves, but for unusual strides.
    _move(
        numbers, features, target, moved, numbers, samples, classes, total, moved, ignore_index,
        rate, paper=True, start=start,
    )  # fmt: skip
    if moved is not centers:
        centers.copy_(moved)


read_op = custom_op("separate_loss::read", _read, mutates_args=())
features_gradient_op = custom_op(
    "separate_loss::features_gradient", _features_gradient, mutates_args=()
)
centers_gradient_op = custom_op(
    "separate_loss::centers_gradient", _centers_gradient, mutates_args=()
)
move_op = custom_op("separate_loss::move_", _move_centers, mutates_args=("centers",))


@read_op.register_fake
def _(*inputs: Any) -> Six:
    return _outputs(inputs[0], inputs[2])


@features_gradient_op.register_fake
def _(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[1], memory_format=torch.contiguous_format)


@centers_gradient_op.register_fake
def _(*inputs: Any) -> Tensor:
    return torch.empty_like(inputs[3], memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, target, centers, ctx.ignore_index = inputs
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)
    # Centers without a gradient may move before the backward pass.
    held = centers if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(features, target, held, *others)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    features, target, centers, numbers, rows, samples, classes, total = ctx.saved_tensors
    of_features = of_centers = None
    if grad is not None:
        if torch.is_grad_enabled() or under_vmap(grad):
            return _eager_backward(ctx, grad)
        batch = grad, features, target
        if ctx.needs_input_grad[0]:
            of_features = features_gradient_op(*batch, numbers, rows, samples, ctx.ignore_index)
        if ctx.needs_input_grad[2]:
            of_centers = centers_gradient_op(
                *batch, centers, numbers, samples, classes, total, ctx.ignore_index
            )
    return of_features, None, of_centers, None


@torch.enable_grad()
def _eager_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients that have derivatives themselves, and that may be batches of gradients."""
    features, target, centers, numbers, rows, *_ = ctx.saved_tensors
    counted = target != ctx.ignore_index
    units, _ = eager.unit(features.where(counted.unsqueeze(-1), 0).to(rows.dtype))
    inter: Tensor | float = 0
    if centers is not None:
        directions, norms = eager.unit(centers.to(rows.dtype))
        rows = directions.index_select(0, target.where(counted, 0).long())
        inter = eager.inter(directions.sum(0), norms)
    # Eq. 4, but for a constant.
    loss = inter - (units * rows).sum() * (numbers[2] / 2)
    needed = ctx.needs_input_grad
    wanted = [one for one, need in ((features, needed[0]), (centers, needed[2])) if need]
    found = list(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return found.pop(0) if needed[0] else None, None, found.pop() if needed[2] else None, None


read_op.register_autograd(_backward, setup_context=_setup_context)


class Step(NamedTuple):
    """What one reading of a batch and of the centers yields: Eq. 4, its terms, and the rest."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    others: tuple[Any, ...]

    def move_(self, centers: Tensor, rate: float | None, *, start: bool) -> None:
        """Eq. 8 on the centers that were read, or a copy of them, in place."""
        move_op(centers, *self.others, rate, start)


def read(features: Tensor, target: Tensor, centers: Tensor, ignore_index: int) -> Step:
    """The loss of features (N, d) with class indices (N,) and centers (C, d)."""
    loss, numbers, _, samples, classes, total = read_op(features, target, centers, ignore_index)
    assert_on_device(
        numbers[4],
        f"target must hold class indices in [0, {centers.shape[0]}) or ignore_index",
    )
    others = features.detach(), target, numbers, samples, classes, total, ignore_index
    return Step(loss, numbers[0], numbers[1], others)
