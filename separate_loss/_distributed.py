"""What keeps the centers equal in all processes of torch.distributed."""

import torch
import torch.distributed as dist
from torch import Tensor

from separate_loss._checks import check_bool
from separate_loss._torch import assert_on_device
from separate_loss._tracing import has_values

MAX_SETTINGS = 512


def check_process_group(process_group: "dist.ProcessGroup | None", sync_centers: object) -> None:
    """None or a group; None without synchronisation."""
    check_bool("sync_centers", sync_centers)
    is_group = dist.is_available() and isinstance(process_group, dist.ProcessGroup)
    if process_group is not None and not is_group:
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup, got "
            f"{type(process_group).__name__}"
        )
    if process_group is not None and not sync_centers:
        raise ValueError("process_group must be None for sync_centers=False, got a ProcessGroup")


def resolve_group(
    process_group: "dist.ProcessGroup | None", sync_centers: bool
) -> "dist.ProcessGroup | None":
    """The group to synchronise with; None if there is none, or a single process in it."""
    if not sync_centers or not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def broadcast_centers_(centers: Tensor, group: "dist.ProcessGroup") -> None:
    """Broadcasts rank 0's centers, in place."""
    shared = centers.detach()
    # A sum with zeros: the compiler traces all_reduce, and no broadcast.
    if dist.get_rank(group) > 0:
        shared.zero_()
    dist.all_reduce(shared, group=group)


def check_own_parameter(centers: Tensor) -> None:
    """Raises for a view of a larger parameter, which some processes would fail to set."""
    if not centers.is_leaf:
        raise RuntimeError(
            "centers must be a parameter of their own, got a view, as FullyShardedDataParallel "
            "makes of the parameters in a model; keep the loss outside of that model, or use "
            "fully_shard"
        )


def check_same_settings(
    settings: dict[str, object], device: torch.device, group: "dist.ProcessGroup"
) -> None:
    """Raises in all processes where settings differ, before backends abort or read garbage."""
    # As text, since all_gather_object needs NumPy. Of one length, so that nothing else is sent.
    text = "\n".join(map(str, settings.values())).encode()[:MAX_SETTINGS].ljust(MAX_SETTINGS)
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group=group)
    texts = [bytes(one.tolist()).decode().rstrip(" ").split("\n") for one in found]
    for name, (first, *others) in zip(settings, zip(*texts, strict=True), strict=True):
        unlike = [f"{one} in process {rank}" for rank, one in enumerate(others, 1) if one != first]
        if unlike:
            raise ValueError(
                f"{name} must be the same in all processes, got {first} in the group's process 0 "
                f"and {', '.join(unlike)}"
            )


def check_same_dtype(num_double: int, size: int) -> None:
    """Raises where some processes compute in float64 and others in float32."""
    if num_double not in (0, size):
        raise ValueError(
            "features must have one type in all processes, got such that "
            f"{num_double} of {size} compute in torch.float64, the others in torch.float32"
        )


def all_reduce_sums(
    group: "dist.ProcessGroup", dtype: torch.dtype, packed: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums class sums (C, d) and counts (C,) over all processes, for centers of a type.

    `packed` (C + 1, d + 1) holds the counts in the last column, and space in the last row.
    """
    # The last row counts the processes that compute in float64.
    packed[-1] = float(packed.dtype == torch.float64)
    message = packed.to(torch.promote_types(dtype, torch.float32))
    dist.all_reduce(message, group=group)
    packed = message.to(packed)
    of_double, size = packed[-1, 0], dist.get_world_size(group)
    if has_values(of_double):
        check_same_dtype(int(of_double), size)
    else:
        same = (of_double == 0) | (of_double == size)
        assert_on_device(same, "features must have one type in all processes")
    return packed[:-1, :-1], packed[:-1, -1]


def all_reduce_gradient(centers: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The centers, with a gradient that is averaged over all processes.

    DistributedDataParallel may average as well: equal gradients stay as they are.
    """

    def averaged(grad: Tensor) -> Tensor:
        if grad.requires_grad:
            raise RuntimeError(
                "centers shared by several processes have no second derivatives; create the loss "
                "with sync_centers=False for them"
            )
        grad = grad / dist.get_world_size(group)
        dist.all_reduce(grad, group=group)
        return grad

    centers = centers.view_as(centers)
    centers.register_hook(averaged)
    return centers
