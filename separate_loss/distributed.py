"""What the processes of torch.distributed share, so that every one holds the same centers."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from separate_loss._checks import can_read
from separate_loss._torch import assert_on_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Processes = Literal["all", "each"]


def check_processes(value: "ProcessGroup | Processes") -> None:
    """A group, or who is to share."""
    if value in ("all", "each") or (dist.is_available() and isinstance(value, dist.ProcessGroup)):
        return
    raise ValueError(
        f"processes must be 'all', 'each' or a torch.distributed.ProcessGroup, got {value!r}"
    )


def group_of(processes: "ProcessGroup | Processes") -> "ProcessGroup | None":
    """The group to share with; None without any, or alone in it."""
    if processes == "each" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if processes == "all" else processes
    return group if dist.get_world_size(group) > 1 else None


def start_equal(centers: Tensor, group: "ProcessGroup") -> None:
    """Broadcasts the centers of the group's first process, in place."""
    shared = centers.detach()
    if not torch.compiler.is_compiling():
        _check_alike(shared, group)
    # A sum with zeros: the compiler traces all_reduce, and no broadcast.
    if dist.get_rank(group) > 0:
        shared.zero_()
    dist.all_reduce(shared, group=group)


def _check_alike(centers: Tensor, group: "ProcessGroup") -> None:
    """Backends abort or read garbage where tensors of unlike sizes or types meet."""
    own = torch.tensor([*centers.shape, _TYPES.index(centers.dtype)], device=centers.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    lists = [other.tolist() for other in found]
    for rank, other in enumerate(lists):
        if other != lists[0]:
            raise ValueError(
                "centers must have one shape and type in all processes, got "
                f"{_described(lists[0])} in the group's process 0 and {_described(other)} in "
                f"process {rank}"
            )


_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def _described(sizes: list[int]) -> str:
    return f"{tuple(sizes[:2])} of {_TYPES[sizes[2]]}"


def check_computed_alike(of_double: int, size: int) -> None:
    """How many of the processes compute in float64; the others do in float32."""
    if of_double not in (0, size):
        raise ValueError(
            "features must have one type in all processes, got such that "
            f"{of_double} of {size} compute in torch.float64, the others in torch.float32"
        )


def sum_over(
    group: "ProcessGroup", dtype: torch.dtype, sums: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The class sums and counts of all processes, from those of each, in one message of a type."""
    packed = torch.cat([sums, count.unsqueeze(-1)], dim=-1)
    # The last row counts the processes that compute in float64.
    is_double = packed.new_full((1, packed.shape[1]), float(packed.dtype == torch.float64))
    packed = torch.cat([packed, is_double]).to(dtype)
    dist.all_reduce(packed, group=group)
    packed, of_double = packed[:-1].to(sums), packed[-1, 0]
    size = dist.get_world_size(group)
    if can_read(of_double):
        check_computed_alike(int(of_double), size)
    else:
        assert_on_device(
            (of_double == 0) | (of_double == size), "features must have one type in all processes"
        )
    return packed[:, :-1], packed[:, -1]


def average_gradient(centers: Tensor, group: "ProcessGroup") -> Tensor:
    """The centers, with a gradient that is the mean over the processes.

    Where DistributedDataParallel averages as well, it finds equal gradients, and leaves them so.
    """

    def averaged(grad: Tensor) -> Tensor:
        if grad.requires_grad:
            raise RuntimeError(
                "centers shared by several processes have no second derivatives; create the loss "
                "with processes='each' for them"
            )
        grad = grad / dist.get_world_size(group)
        dist.all_reduce(grad, group=group)
        return grad

    centers = centers.view_as(centers)
    centers.register_hook(averaged)
    return centers
