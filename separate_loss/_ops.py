"""Small operators that know nothing of the loss. Shapes: (N, d) or (C, d) vectors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from separate_loss._torch import in_autocast
from separate_loss._tracing import has_values, in_eager

# Values in a block of rows. A block stays in the processor's cache over several operators.
BLOCK_SIZE = 2**20

Rows = Tensor | slice | None  # indices, a slice, or all
Blocks = Sequence[slice | None]


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Switches off autocast, under which matrix products would run in half precision."""
    return torch.autocast(device, enabled=False) if in_autocast(device) else nullcontext()


def clamp_value(value: Tensor, lower: float, upper: Tensor | float) -> Tensor:
    """Clamps rounding errors past the bounds; the derivative is that of the identity."""
    if isinstance(upper, Tensor):
        clamped = value.clamp(min=lower).minimum(upper)
    else:
        clamped = value.clamp(lower, upper)
    if in_eager() and not value.requires_grad:
        return clamped
    return value + (clamped - value).detach()


def least_norm(vectors: Tensor) -> float:
    """The norm up to which a vector counts as zero: its square leaves the normal range."""
    return float(torch.finfo(vectors.dtype).tiny ** 0.5)


def read_norms(vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Norms (*, 1), infinite for vectors without direction, and a mask of the others (None: all).

    A vector has no direction if it counts as zero, is not finite, or has an infinite norm.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    least = least_norm(vectors)
    if has_values(norms):
        if norms.numel() == 0:
            return norms, None
        lowest, highest = (bound.item() for bound in norms.aminmax())
        if least < lowest and highest < torch.inf:
            return norms, None
    usable = (norms > least) & (norms < torch.inf)
    return norms.where(usable, torch.inf), usable


def tangent(vectors: Tensor, units: Tensor, out: Tensor | None = None) -> Tensor:
    """The part of vectors that is orthogonal to unit vectors: v - (v . u) u."""
    along = (vectors * units).sum(-1, keepdim=True)
    return torch.addcmul(vectors, along, units, value=-1, out=out)


def row_blocks(vectors: Tensor) -> Blocks:
    """Slices of rows that are blocks; all rows where the code is traced or not on the CPU."""
    rows = max(1, BLOCK_SIZE // vectors.shape[1])
    if len(vectors) <= rows or not has_values(vectors):
        return [None]
    return [slice(start, start + rows) for start in range(0, len(vectors), rows)]


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """Some rows of a tensor."""
    if rows is None:
        return tensor
    return tensor.index_select(0, rows) if isinstance(rows, Tensor) else tensor[rows]
