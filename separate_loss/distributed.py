"""What the processes of torch.distributed share, so that every one holds the same centers."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

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
    """Gives every process the centers of the group's first, in place."""
    # A sum with zeros: the compiler traces all_reduce, and no broadcast.
    shared = centers.detach()
    if dist.get_rank(group) > 0:
        shared.zero_()
    dist.all_reduce(shared, group=group)


def sum_over(group: "ProcessGroup", sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The class sums and counts of all processes, from those of each, in one message."""
    packed = torch.cat([sums, count.unsqueeze(-1)], dim=-1)
    dist.all_reduce(packed, group=group)
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
