"""The step for class indices in four Triton kernels, registered with torch.library.

The kernels support the mean reduction without class weights; `backend` decides when they run. They
compute in float32, or in float64 if an input is of that type. A step launches `read` (centers and
batch), `finish` (both terms), `features_gradient`, and `move` for the new centers or for their
gradient.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op

from separate_loss._batch import Options, compute_dtype
from separate_loss._centers import CENTER_LR_PER_SAMPLE, read_centers
from separate_loss._terms import inter_class, normalize
from separate_loss._torch import assert_on_device, under_vmap
from separate_loss._triton import kernels

INTERPRETED = bool(triton.knobs.runtime.interpret)

# The most programs for centers, and the most values that a program holds at a time.
PROGRAMS, TILE = 1024, 2048
BATCH = 1024
# Labels that a program reads at a time; it reads them one by one if its classes are among them.
LABELS = 32


def _launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    if programs == 0:
        return
    device = next(value for value in arguments if isinstance(value, Tensor))
    with torch.cuda.device_of(device):
        kernel[(programs,)](*arguments, **constants)


@cache
def works_on(device: torch.device) -> bool:
    """Whether Triton can build and run the kernels on a GPU; warns once if it cannot."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        sample = torch.ones(1, 2, device=device)
        _read(sample, torch.zeros(1, dtype=torch.long, device=device), sample.repeat(2, 1), -100)
    except Exception as error:  # compilers, linkers and drivers raise errors of many types
        warnings.warn(
            f"separate_loss runs without its Triton kernels, which cannot be built here: {error}",
            stacklevel=2,
        )
        return False
    return True


def _config(computed: Tensor, d: int) -> dict[str, Any]:
    width = triton.next_power_of_2(d)
    wide = computed.dtype == torch.float64
    return {
        "ACC": triton.language.float64 if wide else triton.language.float32,
        "WIDTH": width,
        "num_warps": min(max(4, width // 512), 16),
        "enable_fp_fusion": True,
    }


def _rows_config(num_classes: int, config: dict[str, Any]) -> dict[str, Any]:
    """Adds how many centers a program holds at a time, and the largest norm that counts as zero."""
    few = triton.next_power_of_2(triton.cdiv(num_classes, PROGRAMS))
    tiny = 2.0**-511 if config["ACC"] == triton.language.float64 else 2.0**-63
    return {**config, "ROWS": min(max(1, TILE // config["WIDTH"]), few), "TINY": tiny}


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _empty_outputs(features: Tensor, centers: Tensor) -> Outputs:
    """What `read` and `finish` write.

    - loss: a scalar.
    - scalars (5,): intra, inter, 1 / the number of samples that are not ignored, 1 / the number
      of those that are finite, and 1 if all labels are in range.
    - target_centers (N, d): the unit centers of the samples' classes.
    - sample_stats (2, N): cosines and inverse norms.
    - class_stats (2, C): inverse norms, and 1 if the class is in the batch.
    - center_sum (d,): the sum of the unit centers.
    """
    dtype = compute_dtype(features, centers)
    (num_samples, d), num_classes = features.shape, centers.shape[0]
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(5, dtype=dtype),
        features.new_empty(num_samples, d, dtype=dtype),
        features.new_empty(2, num_samples, dtype=dtype),
        features.new_empty(2, num_classes, dtype=dtype),
        features.new_empty(d, dtype=dtype),
    )


def _read(features: Tensor, target: Tensor, centers: Tensor, ignore_index: int) -> Outputs:
    outputs = loss, scalars, target_centers, sample_stats, class_stats, center_sum = _empty_outputs(
        features, centers
    )
    features, target, centers = features.contiguous(), target.contiguous(), centers.contiguous()
    (num_samples, d), num_classes = features.shape, centers.shape[0]
    config = _config(center_sum, d)
    rows_config = _rows_config(num_classes, config)
    each = (
        triton.cdiv(triton.cdiv(num_classes, PROGRAMS), rows_config["ROWS"]) * rows_config["ROWS"]
    )
    blocks = triton.cdiv(num_classes, each)
    partial = center_sum.new_empty(blocks * (d + 1))
    sizes = num_samples, num_classes, d, ignore_index, blocks
    _launch(
        kernels.read, blocks + num_samples,
        features, target, centers, partial, class_stats, sample_stats, target_centers,
        *sizes, each, **rows_config,
    )  # fmt: skip
    config |= {"ROWS": max(1, 4 * TILE // config["WIDTH"]), "num_warps": 2 * config["num_warps"]}
    _launch(
        kernels.finish, 1,
        target, partial, sample_stats, class_stats, center_sum, loss, scalars,
        *sizes, BATCH=BATCH, **config,
    )  # fmt: skip
    return outputs


def _features_gradient(
    grad: Tensor, features: Tensor, target: Tensor, scalars: Tensor, target_centers: Tensor,
    sample_stats: Tensor, ignore_index: int,
) -> Tensor:  # fmt: skip
    features, target = features.contiguous(), target.contiguous()
    out = torch.empty_like(features)
    num_samples, d = features.shape
    _launch(
        kernels.features_gradient, num_samples,
        grad, features, target, sample_stats, target_centers, scalars, out,
        num_samples, d, ignore_index,
        **_config(target_centers, d),
    )  # fmt: skip
    return out


def _move(
    grad: Tensor, features: Tensor, target: Tensor, centers: Tensor, scalars: Tensor,
    sample_stats: Tensor, class_stats: Tensor, center_sum: Tensor, out: Tensor, ignore_index: int,
    rate: float | None = 0.0, *, paper: bool = False, start: bool = False,
) -> None:  # fmt: skip
    features, target = features.contiguous(), target.contiguous()
    num_classes, d = centers.shape
    rows_config = _rows_config(num_classes, _config(center_sum, d))
    _launch(
        kernels.move, triton.cdiv(num_classes, rows_config["ROWS"]),
        grad, features, target, centers, sample_stats, class_stats, center_sum, scalars, out,
        features.shape[0], num_classes, d, ignore_index,
        CENTER_LR_PER_SAMPLE if rate is None else rate,
        PER_SAMPLE=rate is None, PAPER=paper, START=start, LABELS=LABELS, **rows_config,
    )  # fmt: skip


def _centers_gradient(
    grad: Tensor, features: Tensor, target: Tensor, centers: Tensor, scalars: Tensor,
    sample_stats: Tensor, class_stats: Tensor, center_sum: Tensor, ignore_index: int,
) -> Tensor:  # fmt: skip
    centers = centers.contiguous()
    out = torch.empty_like(centers)
    _move(
        grad,
        features,
        target,
        centers,
        scalars,
        sample_stats,
        class_stats,
        center_sum,
        out,
        ignore_index,
    )
    return out


def _move_centers(
    centers: Tensor, features: Tensor, target: Tensor, scalars: Tensor, sample_stats: Tensor,
    class_stats: Tensor, center_sum: Tensor, ignore_index: int, rate: float | None, start: bool,
) -> None:  # fmt: skip
    moved = centers.contiguous()  # The centers themselves, unless their strides are unusual.
    _move(
        scalars, features, target, moved, scalars, sample_stats, class_stats, center_sum, moved,
        ignore_index, rate, paper=True, start=start,
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
def _(*inputs: Any) -> Outputs:
    return _empty_outputs(inputs[0], inputs[2])


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
    # Centers without a gradient may change in place before the backward pass.
    held = centers if ctx.needs_input_grad[2] else None
    ctx.save_for_backward(features, target, held, *others)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    features, target, centers, scalars, target_centers, sample_stats, class_stats, center_sum = (
        ctx.saved_tensors
    )
    of_features = of_centers = None
    if grad is not None:
        if torch.is_grad_enabled() or under_vmap(grad):
            return _differentiable_backward(ctx, grad)
        batch = grad, features, target
        if ctx.needs_input_grad[0]:
            of_features = features_gradient_op(
                *batch, scalars, target_centers, sample_stats, ctx.ignore_index
            )
        if ctx.needs_input_grad[2]:
            of_centers = centers_gradient_op(
                *batch, centers, scalars, sample_stats, class_stats, center_sum, ctx.ignore_index
            )
    return of_features, None, of_centers, None


@torch.enable_grad()
def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by PyTorch's operators: differentiable, and under vmap."""
    features, target, centers, scalars, target_centers, *_ = ctx.saved_tensors
    valid = target != ctx.ignore_index
    dtype = target_centers.dtype
    unit_features, _ = normalize(features.where(valid.unsqueeze(-1), 0).to(dtype))
    inter: Tensor | float = 0
    if centers is not None:
        index = target.where(valid, 0).long()
        _, units, center_sum, _, num_centers, num_classes = read_centers(
            centers.to(dtype), simplex=False, differentiable=True
        )
        assert units is not None
        target_centers = units.index_select(0, index)
        inter = inter_class(center_sum, None, num_centers, num_classes)
    # Eq. 4 without a constant.
    loss = inter - (unit_features * target_centers).sum() * (scalars[2] / 2)
    needed = ctx.needs_input_grad
    wanted = [one for one, need in ((features, needed[0]), (centers, needed[2])) if need]
    found = list(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return found.pop(0) if needed[0] else None, None, found.pop() if needed[2] else None, None


read_op.register_autograd(_backward, setup_context=_setup_context)


class TritonStep(NamedTuple):
    """A step by the Triton kernels."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    num_centers: Tensor
    saved: tuple[Any, ...]

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool = False
    ) -> None:
        """Applies Eq. 8 to the centers of the step, or to a copy of them, in place."""
        move_op(centers, *self.saved, center_lr, start_zeros)


def run_step(features: Tensor, target: Tensor, centers: Tensor, options: Options) -> TritonStep:
    """Computes both terms, of validated arguments."""
    features = features.reshape(-1, centers.shape[1])
    target = target.reshape(-1)
    loss, scalars, _, *stats = read_op(features, target, centers, options.ignore_index)
    assert_on_device(
        scalars[4],
        f"target must hold class indices in [0, {len(centers)}) or ignore_index",
    )
    saved = features.detach(), target, scalars, *stats, options.ignore_index
    num_centers = (stats[1][0] != 0).sum()
    return TritonStep(loss, scalars[0], scalars[1], num_centers, saved)
