"""The loss with centers sharded over the processes of torch.distributed, for very many classes.

`import separate_loss` does not import this module, which needs torch.distributed.tensor.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from separate_loss import _initial, _step
from separate_loss._batch import Batch, check_arguments, prepare_batch
from separate_loss._centers import CenterStatistics, read_centers, update_centers_
from separate_loss._checks import CenterInit, Form, Reduction
from separate_loss._distributed import check_same_dtype
from separate_loss._modules import SeparateLoss, Terms
from separate_loss._ops import full_precision
from separate_loss._tracing import has_values

__all__ = ["ShardedSeparateLoss"]


class ShardedSeparateLoss(SeparateLoss):
    r"""`SeparateLoss` under the forward update, with C/k centers on each of k processes.

    Each process passes its own part of the batch, which may be empty, and gets the loss of
    `SeparateLoss` on it. A message holds at most one row per sample (docs/cost.md).

    Every process must make every call, in training and in evaluation. Do not wrap the module in
    `DistributedDataParallel`, which would overwrite all shards with rank 0's.

    Args:
        num_classes, feature_dim, center_lr, ignore_index, reduction: as in `SeparateLoss`.
        form: as there. ``"simplex"`` sends d^2 more numbers.
        center_init: as there; a tensor has shape (C, d) on every process.
        mesh: the processes to shard over, in one dimension; None takes all.
        device, dtype: of the centers, as there; the mesh's device by default.

    Shape:
        features `(*, d)` and class indices `(*)` to a scalar, or to `(*)` for ``reduction="none"``.

    Attributes:
        centers: (C, d), a `DTensor` buffer with placement `Shard(0)`: `centers.to_local()` are this
            process's rows. torch.distributed.checkpoint loads them on any number of processes.
        last_terms: as in `SeparateLoss`; `intra` is that of this process's samples.

    Raises:
        TypeError, ValueError, IndexError: as in `SeparateLoss`, settings that differ between
            processes at construction; TypeError also for class probabilities, which need all
            centers.
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
        form: Form = "simplex",
        center_lr: float | None = None,
        center_init: CenterInit | Tensor = "features",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        mesh: DeviceMesh | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError("call torch.distributed.init_process_group before sharding centers")
        if device is None:
            device = torch.get_default_device() if mesh is None else mesh.device_type
        device = torch.device(device)
        if mesh is None:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        if mesh.ndim != 1 or mesh.device_type != device.type:
            raise ValueError(f"mesh must have one dimension of {device.type} devices, got {mesh}")
        self._mesh = mesh  # first, as `_create_centers` needs it
        super().__init__(
            num_classes, feature_dim, form=form, center_lr=center_lr, center_init=center_init,
            ignore_index=ignore_index, reduction=reduction, device=device, dtype=dtype,
        )  # fmt: skip
        self._check_same_settings(mesh.get_group())

    def _create_centers(self, center_init: CenterInit | Tensor, **kind: Any) -> None:
        shape, strides = (self.num_classes, self.feature_dim), (self.feature_dim, 1)
        # As `Shard` splits rows: equal numbers for all but the last processes.
        self._rows_each = -(-self.num_classes // self._mesh.size())
        self._first_row = self._mesh.get_local_rank() * self._rows_each
        own = slice(self._first_row, self._first_row + self._rows_each)
        self._init = _initial.given_centers(center_init, shape, "forward", own)
        shard = torch.empty(len(range(self.num_classes)[own]), self.feature_dim, **kind)
        centers = DTensor.from_local(
            shard, self._mesh, [Shard(0)], shape=torch.Size(shape), stride=strides
        )
        self.register_buffer("centers", centers)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets this process's centers to their initial values, without communication."""
        shard, generator = self.centers.to_local(), None
        if self.center_init not in ("features", "tensor"):
            # Processes with the same seed must draw different rows.
            seed = int(torch.randint(2**62, ())) + self._mesh.get_local_rank()
            generator = torch.Generator(shard.device).manual_seed(seed)
        _initial.init_centers_(shard, self._init, generator)
        self._seen = None

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Returns the loss; then, in training, updates the centers."""
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(
                "target must hold class indices (an integer type) where centers are sharded, "
                f"got {target.dtype}"
            )
        with torch.no_grad():
            shard = self.centers.to_local()
        sizes = len(shard), self.feature_dim
        self._seen = _initial.look_at_(shard, self._seen, sizes, "forward", self.centers)
        options = self._options()
        check_arguments(features, target, shard, options, self.num_classes)
        with full_precision(shard.device.type):
            batch = prepare_batch(features, target, shard, options, self.num_classes)
            update = self.training and torch.is_grad_enabled()
            with torch.no_grad():
                step = self._evaluate(batch, update=update)
            loss = _step.with_gradients(step)
        self.last_terms = Terms(step.intra, step.inter, step.num_centers)
        return loss.reshape(features.shape[:-1]) if self.reduction == "none" else loss

    def _evaluate(self, batch: Batch, *, update: bool) -> _step.Step:
        """One step with messages to and from the owners of centers."""
        # Each class is sent once, in order, so that classes of one shard are adjacent.
        classes, class_of_sample = batch.target.unique(return_inverse=True)
        group = self._mesh.get_group()
        sent, received = self._count_rows(classes, batch.centers.dtype == torch.float64)
        index = _move(classes, sent, received, group) - self._first_row
        own = read_centers(batch.centers, self.form, by_class=False)
        rows = _move(own.unit_rows(batch.centers, index), received, sent, group)
        samples = _step.compare(batch, rows.index_select(0, class_of_sample))
        units, valid = _step.finite_samples(batch, samples)
        sums, counts = _step.class_sums(units, class_of_sample, valid, len(classes))
        statistics, num_samples = _all_reduce(group, own, counts.sum())
        statistics = statistics._replace(num_classes=self.num_classes)
        step = _step.evaluate(batch, samples, statistics)
        if update:
            packed = torch.cat([sums, counts.unsqueeze(-1)], dim=-1)
            packed = _move(packed, sent, received, group)
            update_centers_(
                batch.centers, statistics, packed[:, :-1], packed[:, -1], index,
                center_lr=self.center_lr, num_samples=num_samples, start_zeros=True,
            )  # fmt: skip
            shard = self.centers.to_local()
            if batch.centers is not shard:
                shard.copy_(batch.centers)
            self._seen = _initial.seen_now(shard, "forward", self.centers)
        return step

    def _count_rows(self, classes: Tensor, is_double: bool) -> list[list[int]]:
        """Numbers of rows to send to each process for sorted classes, and to receive from it."""
        counts = (classes // self._rows_each).bincount(minlength=self._mesh.size())
        sent = torch.stack([counts, torch.full_like(counts, is_double)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._mesh.get_group())
        rows, doubles = torch.stack([sent, received]).permute(2, 0, 1).tolist()
        check_same_dtype(sum(doubles[1]), self._mesh.size())
        return list(rows)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return f"{super().extra_repr()}, processes={self._mesh.size()}"


def _all_reduce(
    group: dist.ProcessGroup, own: CenterStatistics, num_samples: Tensor
) -> tuple[CenterStatistics, Tensor]:
    """Sums statistics of the shards and numbers of samples over all processes, in one message."""
    d = len(own.center_sum)
    parts = [torch.as_tensor(own.num_centers).to(num_samples).reshape(1), num_samples.reshape(1)]
    parts += [own.center_sum] if own.gram is None else [own.center_sum, own.gram.flatten()]
    packed = torch.cat(parts)
    dist.all_reduce(packed, group=group)
    num_centers, num_samples, center_sum = packed[0], packed[1], packed[2 : 2 + d]
    return own._replace(
        num_centers=num_centers.item() if has_values(packed) else num_centers,
        center_sum=center_sum,
        gram=None if own.gram is None else packed[2 + d :].view(d, d),
    ), num_samples


def _move(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends numbers of rows to the processes of a group, and returns those that arrive."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows, received, sent, group=group)
    return arrived
