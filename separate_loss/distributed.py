"""What the processes of torch.distributed share, so that every one holds the same centers."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from separate_loss.functional import Summed

ProcessGroup = dist.ProcessGroup | Literal["default", "none"]


def group_of(process_group: ProcessGroup) -> dist.ProcessGroup | None:
    """The group to share with; None without any, or alone in it."""
    if process_group == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group == "default" else process_group
    return group if dist.get_world_size(group) > 1 else None


def start_equal(centers: Tensor, group: dist.ProcessGroup) -> None:
    """Gives every process the centers of the group's first, in place."""
    dist.broadcast(centers.detach(), group=group, group_src=0)


def sum_over(group: dist.ProcessGroup) -> Summed:
    """A function from one process's class sums and counts to the sums of all, in one message."""

    def summed(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.cat([sums, count.unsqueeze(-1)], dim=-1)
        dist.all_reduce(packed, group=group)
        return packed[:, :-1], packed[:, -1]

    return summed


def average_gradient(centers: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The centers, whose gradient will be the mean over processes: that of the global batch.

    Where DistributedDataParallel averages as well, it finds equal gradients, and leaves them.
    """

    def averaged(grad: Tensor) -> Tensor:
        grad = grad / dist.get_world_size(group)
        dist.all_reduce(grad, group=group)
        return grad

    centers = centers.view_as(centers)
    centers.register_hook(averaged)
    return centers
