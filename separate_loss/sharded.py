"""The loss with centers spread over the processes of torch.distributed, for very many classes.

Import it by name: `separate_loss` itself does without torch.distributed.tensor.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from separate_loss import ops
from separate_loss._checks import (
    REDUCTIONS,
    SEPARATIONS,
    CenterInit,
    Reduction,
    Separation,
    check_bool,
    check_center_init,
    check_center_lr,
    check_choice,
    check_int,
    check_set,
)
from separate_loss.distributed import check_computed_alike
from separate_loss.functional import finite, intra_terms, read_batch, reduce
from separate_loss.modules import Terms, fill

__all__ = ["ShardedSeparateLoss"]


class ShardedSeparateLoss(nn.Module):
    r"""`SeparateLoss` under the paper's update, with C/k centers on each of k processes.

    Each process brings its own part of the batch and gets the loss of `SeparateLoss` on it. Samples
    meet their centers by messages that hold at most a row per sample, so that no message and no
    process holds C x d values. docs/scaling.md counts them.

    Every process must make every call, in training and in evaluation: one without samples calls
    with an empty batch. Keep the module out of `DistributedDataParallel`, which would make its
    buffers equal.

    Args:
        num_classes, feature_dim: as in `SeparateLoss`.
        center_lr, center_init: as there; a tensor is whole, (C, d), on every process.
        ignore_index, reduction, scale_free, separation: as there. ``"square"`` sends d^2 numbers
            more.
        mesh: the processes to spread over, in one dimension; None takes all.
        device, dtype: of the centers, as there; the mesh's device by default.

    Shape:
        features `(*, d)` and class indices `(*)`, whose number may differ between processes, to a
        scalar, or `(*)` for ``reduction="none"``.

    Attributes:
        centers: (C, d), a `DTensor` buffer with placement `Shard(0)`: `centers.to_local()` are this
            process's rows, and torch.distributed.checkpoint loads them on any number of processes.
        last_terms: as in `SeparateLoss`; intra is that of the own part.

    Raises:
        TypeError, ValueError, IndexError: as in `SeparateLoss`; TypeError also
            for class probabilities, which need all centers.
        RuntimeError: torch.distributed is not initialised.

    Examples:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> criterion = ShardedSeparateLoss(num_classes=1000, feature_dim=8)
        >>> features = torch.randn(16, 8, requires_grad=True)
        >>> criterion(features, torch.randint(1000, (16,))).backward()
        >>> criterion.centers.to_local().shape
        torch.Size([1000, 8])
        >>> dist.destroy_process_group()

    """

    centers: DTensor

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        center_lr: float | None = None,
        center_init: CenterInit | Tensor = "features",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        scale_free: bool = False,
        separation: Separation = "mean",
        mesh: DeviceMesh | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, least=2)
        check_int("feature_dim", feature_dim, least=1)
        check_center_lr(center_lr)
        check_center_init(center_init, (num_classes, feature_dim), "paper")
        check_int("ignore_index", ignore_index)
        check_choice("reduction", reduction, REDUCTIONS)
        check_bool("scale_free", scale_free)
        check_choice("separation", separation, SEPARATIONS)
        if not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group before sharding centers")
        if device is None:
            device = torch.get_default_device() if mesh is None else mesh.device_type
        device = torch.device(device)
        if mesh is None:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if mesh.ndim != 1 or mesh.device_type != device.type:
            raise ValueError(f"mesh must have one dimension of {device.type} devices, got {mesh}")

        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.center_lr = center_lr
        self.center_init = center_init if isinstance(center_init, str) else "tensor"
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.scale_free = scale_free
        self.separation: Separation = separation
        self.last_terms: Terms | None = None

        # As `Shard` deals rows: equally many to all but the last processes.
        self._rows_each = -(-num_classes // mesh.size())
        self._first_row = min(mesh.get_local_rank() * self._rows_each, num_classes)
        own = slice(self._first_row, min(self._first_row + self._rows_each, num_classes))
        self._start = center_init if isinstance(center_init, str) else center_init[own]
        shard = torch.empty(own.stop - own.start, feature_dim, device=device, dtype=dtype)
        centers = DTensor.from_local(
            shard,
            mesh,
            [Shard(0)],
            shape=torch.Size((num_classes, feature_dim)),
            stride=(feature_dim, 1),
        )
        self.register_buffer("centers", centers)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Puts this process's centers where they start. Sends nothing."""
        shard, generator = self.centers.to_local(), None
        if self.center_init not in ("features", "tensor"):
            # Processes with equal seeds must not draw equal rows.
            seed = int(torch.randint(2**62, ())) + self.centers.device_mesh.get_local_rank()
            generator = torch.Generator(shard.device).manual_seed(seed)
        fill(shard, self._start, generator)
        self._checked = False

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss under the centers as they are; then, in training, the centers move."""
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(
                "target must hold class indices (an integer type) where centers are sharded, "
                f"got {target.dtype}"
            )
        with torch.no_grad():
            shard = self.centers.to_local()
        if not self._checked:
            check_set("centers", shard, is_set=True)
            self._checked = True
        batch = read_batch(
            features,
            target,
            shard,
            None,
            self.ignore_index,
            self.num_classes,
            scale_free=self.scale_free,
        )
        matrix = None
        if self.separation == "square":
            norms, total, matrix = ops.gram(batch.centers)
        else:
            norms, total = ops.norms_and_total(batch.centers)

        # Each class travels once, and in order, so that those of one shard stand together.
        classes, of_sample = batch.target.unique(return_inverse=True)
        exchange = self._exchange(classes, batch.centers.dtype == torch.float64)
        index = exchange.to_owners(classes) - self._first_row
        rows = batch.centers.index_select(0, index) / norms.index_select(0, index).unsqueeze(-1)
        units, _ = ops.unit(batch.features)
        cosines = (units * exchange.from_owners(rows).index_select(0, of_sample)).sum(-1)
        cosines = ops.within(cosines, -1, 1)

        # Eq. 3 and the batch's size need every process.
        with torch.no_grad():
            kept, _, counted = finite(units, cosines, batch.counted)
            sums, count = ops.class_sums(kept, of_sample, counted, len(classes))
            whole = self._of_all(norms, total, matrix, count, exchange.group)

        intra = intra_terms(batch, cosines)
        mean = reduce(intra, batch.mass, None, "mean")
        self.last_terms = Terms(mean.detach(), whole.inter)
        if self.training and torch.is_grad_enabled():
            # Of a class here, the sums of all processes' samples.
            packed = exchange.to_owners(torch.cat([sums, count.unsqueeze(-1)], dim=-1))
            sums, count = packed[:, :-1], packed[:, -1]
            # The shard itself, or a copy of it in the type that was computed in.
            centers = batch.centers
            rate = ops.rate_for(self.center_lr, whole.batch_size, self.num_classes)
            self._push_apart(centers, norms, whole, rate)
            ops.pull_by_index_(
                centers,
                sums,
                index,
                count,
                rows=rows,
                cosines=(sums * rows).sum(-1),
                norms=norms,
                rate=rate,
                start=True,
                batch_size=whole.batch_size,
            )
            if centers is not shard:
                shard.copy_(centers)
        loss = reduce(intra, batch.mass, whole.inter, self.reduction)
        return loss.reshape(features.shape[:-1]) if self.reduction == "none" else loss

    def _of_all(
        self,
        norms: Tensor,
        total: Tensor,
        matrix: Tensor | None,
        count: Tensor,
        group: dist.ProcessGroup,
    ) -> "_Whole":
        """The separation and the size of the batch, from each process's part, in one message."""
        numbers = torch.stack([(norms != torch.inf).sum(), count.sum()])
        parts = [numbers, total] if matrix is None else [numbers, total, matrix.flatten()]
        shared = torch.cat(parts)
        dist.all_reduce(shared, group=group)
        nonzero, batch_size = shared[:2]
        total, shared = shared[2:].tensor_split([self.feature_dim])
        if matrix is None:
            inter = ops.inter_by_count(total, nonzero, self.num_classes)
            return _Whole(inter, total, None, batch_size)
        matrix = shared.view_as(matrix)
        inter = ops.square_of(total, matrix, nonzero, self.num_classes)
        return _Whole(inter, total, matrix, batch_size)

    def _push_apart(
        self, centers: Tensor, norms: Tensor, whole: "_Whole", rate: Tensor | float
    ) -> None:
        if whole.matrix is None:
            ops.push_apart_(centers, norms, whole.total, rate, num_classes=self.num_classes)
            return
        push, matrix = ops.push_of_square(whole.total, whole.matrix, self.num_classes, rate)
        ops.push_apart_by_(centers, norms, push, matrix)

    def _exchange(self, classes: Tensor, is_double: bool) -> "_Exchange":
        """From the classes of the own samples, in order, and how the process computes."""
        mesh = self.centers.device_mesh
        owners = classes // self._rows_each
        counts = owners.bincount(minlength=mesh.size())
        sent = torch.stack([counts, torch.full_like(counts, is_double)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=mesh.get_group())
        sizes, doubles = torch.stack([sent, received]).permute(2, 0, 1).tolist()
        check_computed_alike(sum(doubles[1]), mesh.size())
        return _Exchange(mesh.get_group(), *sizes)

    def extra_repr(self) -> str:
        """The arguments as they are in force, for `repr`."""
        return (
            f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, "
            f"center_lr={self.center_lr}, center_init={self.center_init!r}, "
            f"scale_free={self.scale_free}, separation={self.separation!r}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"processes={self.centers.device_mesh.size()}"
        )


class _Whole(NamedTuple):
    """What is of all centers and of all samples."""

    inter: Tensor
    total: Tensor  # (d,), the sum of the centers' directions
    matrix: Tensor | None  # (d, d), their Gram matrix, for the squared separation
    batch_size: Tensor


class _Exchange(NamedTuple):
    """How many rows go to the processes that own their classes, and how many come from each."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    def to_owners(self, rows: Tensor) -> Tensor:
        return self._move(rows, self.sent, self.received)

    def from_owners(self, rows: Tensor) -> Tensor:
        return self._move(rows, self.received, self.sent)

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows, received, sent, group=self.group)
        return arrived
