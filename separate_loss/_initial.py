"""The values of centers: where they start, and a look at those that others wrote."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from separate_loss import _checks
from separate_loss._checks import CenterInit, CenterUpdate
from separate_loss._torch import under_vmap, version_of
from separate_loss._tracing import has_values

Seen = tuple[weakref.ref[Tensor], tuple[int | None, ...]]
"""The tensor whose values were looked at, and how often it had been changed by then."""


def given_tensor(value: Any) -> Any:
    """A detached tensor of an array or tensor; other values as they are."""
    if not isinstance(value, Tensor):
        # The device must be named: under `torch.device("meta")` the values would be lost.
        return torch.as_tensor(value, device="cpu") if hasattr(value, "__array__") else value
    return value.detach()


def given_centers(
    value: Any, shape: tuple[int, int], center_update: CenterUpdate, rows: slice | None = None
) -> CenterInit | Tensor:
    """Validated initial values; of a tensor a copy, or a copy of some of its rows."""
    init: CenterInit | Tensor = given_tensor(value)
    _checks.check_center_init(init, shape, center_update)
    if not isinstance(init, Tensor):
        return init
    init = init[slice(None) if rows is None else rows].clone()
    if center_update == "forward" and not init.is_meta:
        unit_rows_(init)
    return init


def unit_rows_(rows: Tensor) -> None:
    """Makes rows unit, and rows that are not finite zero, in place.

    Eq. 7 turns a center in inverse proportion to its squared norm.
    """
    zero_nonfinite_(rows)
    kind = torch.finfo(rows.dtype)
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
    # Their squares would overflow.
    extreme = (largest > kind.max**0.25) | (largest < kind.tiny**0.25)
    rows.div_(largest.where(extreme & (largest > 0), 1))
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    # Rows that are unit within rounding stay as they are.
    rows.div_(norms.where((norms > 0) & ((norms - 1).abs() > 2 * kind.eps), 1))


def zero_nonfinite_(rows: Tensor) -> None:
    """Sets rows that are not finite to zero, in place."""
    finite = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).isfinite()
    if not (has_values(finite) and bool(finite.all())):
        rows.masked_fill_(~finite, 0)


def init_centers_(
    centers: Tensor, init: CenterInit | Tensor, generator: torch.Generator | None = None
) -> None:
    """Sets centers to their initial values, in place."""
    if isinstance(init, Tensor):
        restore_(centers, init)
    elif init == "features":
        centers.zero_()
    else:
        nn.init.normal_(centers, generator=generator)
        centers.div_(torch.linalg.vector_norm(centers, dim=-1, keepdim=True))


def restore_(tensor: Tensor, values: Tensor) -> None:
    """Copies values, or NaN if they were on the meta device."""
    if type(tensor).__name__ == "DTensor":
        from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415

        assert isinstance(tensor, DTensor)
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements)
    if values.is_meta and not tensor.is_meta:
        tensor.fill_(torch.nan)
    else:
        tensor.copy_(values)


def seen_now(centers: Tensor, center_update: CenterUpdate, whole: Tensor | None = None) -> Seen:
    """What is known of the values of centers. An optimizer may change a parameter."""
    free = center_update == "gradient"
    return weakref.ref(centers), () if free else (version_of(centers), version_of(whole))


def look_at_(
    centers: Tensor, seen: Seen | None, shape: tuple[int, int], center_update: CenterUpdate,
    whole: Tensor | None = None,
) -> Seen | None:  # fmt: skip
    """Looks at centers that are not those `seen` last; returns what is seen now.

    A row that is not finite becomes zero. A parameter with such a row or one of zeros is refused. A
    caller's own graph is left alone. `whole` is the DTensor of a shard.
    """
    if seen is not None and isinstance(centers, Tensor) and seen[0]() is centers:
        now = seen_now(centers, center_update, whole)
        if now[1] == seen[1]:
            return now
    _checks.check_shape("centers", centers, shape)
    if center_update == "forward" and centers.requires_grad:
        raise TypeError(
            "centers must require no gradient for center_update='forward', got a parameter"
        )
    if centers.is_meta or type(centers) not in (Tensor, nn.Parameter) or under_vmap(centers):
        return None
    if center_update == "gradient":
        _checks.check_directions("centers", centers)
    elif not centers.requires_grad:
        with torch.no_grad():
            zero_nonfinite_(centers)
    return seen_now(centers, center_update, whole)
