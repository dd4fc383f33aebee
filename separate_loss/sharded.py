"""The loss with centers sharded over the processes of torch.distributed, for very many classes.

`import separate_loss` does not import this module, which needs torch.distributed.tensor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from separate_loss._batch import Batch, Options, check_arguments, prepare_batch
from separate_loss._centers import CenterStatistics, read_centers, update_centers_
from separate_loss._checks import (
    CenterInit,
    Form,
    Reduction,
    check_center_lr,
    check_int,
)
from separate_loss._distributed import check_same_dtype, check_same_settings
from separate_loss._initial import (
    Seen,
    apply_to,
    given_centers,
    init_centers_,
    look_at_,
    seen_now,
)
from separate_loss._modules import Terms
from separate_loss._ops import full_precision
from separate_loss._step import (
    Step,
    class_sums,
    combine,
    compare,
    finite_samples,
    with_gradients,
)
from separate_loss._tracing import has_values

__all__ = ["ShardedSeparateLoss"]


class ShardedSeparateLoss(nn.Module):
    r"""`SeparateLoss` under the forward update, with C/k centers on each of k processes.

    Each process passes its own part of the batch and gets the loss of `SeparateLoss` on it. A
    message holds at most one row per sample, so that no message and no process holds C x d values.
    docs/cost.md lists the sizes of messages.

    Every process must make every call, in training and in evaluation; a process without samples
    passes an empty batch. Do not wrap the module in `DistributedDataParallel`, which would
    overwrite all shards with rank 0's.

    Args:
        num_classes, feature_dim: as in `SeparateLoss`.
        form: as there. ``"simplex"`` sends d^2 more numbers.
        center_lr, center_init: as there; a tensor has shape (C, d) on every process.
        ignore_index, reduction: as there.
        mesh: the processes to shard over, in one dimension; None takes all.
        device, dtype: of the centers, as there; the mesh's device by default.

    Shape:
        features `(*, d)` and class indices `(*)` to a scalar, or to `(*)` for
        ``reduction="none"``. The number of samples may differ between processes.

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
        super().__init__()
        num_classes = check_int("num_classes", num_classes, least=2)
        feature_dim = check_int("feature_dim", feature_dim, least=1)
        center_lr = check_center_lr(center_lr)
        Options(form, None, ignore_index, reduction).check()
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
        self.form: Form = form
        self.center_lr = center_lr
        self.ignore_index = int(ignore_index)
        self.reduction: Reduction = reduction
        self.last_terms: Terms | None = None

        # As `Shard` splits rows: equal numbers for all but the last processes.
        self._rows_each = -(-num_classes // mesh.size())
        self._first_row = min(mesh.get_local_rank() * self._rows_each, num_classes)
        own = slice(self._first_row, min(self._first_row + self._rows_each, num_classes))
        shape = num_classes, feature_dim
        self._init = given_centers(center_init, shape, "forward", own)
        self.center_init = "tensor" if isinstance(self._init, Tensor) else self._init
        shard = torch.empty(own.stop - own.start, feature_dim, device=device, dtype=dtype)
        centers = DTensor.from_local(
            shard,
            mesh,
            [Shard(0)],
            shape=torch.Size(shape),
            stride=(feature_dim, 1),
        )
        self.register_buffer("centers", centers)
        self.reset_parameters()
        settings = {"center_lr": center_lr, **self._options()._asdict()}
        settings["centers"] = f"{shape} of {centers.dtype}"
        check_same_settings(settings, device, mesh.get_group())

    def _options(self) -> Options:
        return Options(self.form, None, self.ignore_index, self.reduction)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Resets this process's centers to their initial values, without communication."""
        shard, generator = self.centers.to_local(), None
        if self.center_init not in ("features", "tensor"):
            # Processes with the same seed must draw different rows.
            seed = int(torch.randint(2**62, ())) + self.centers.device_mesh.get_local_rank()
            generator = torch.Generator(shard.device).manual_seed(seed)
        init_centers_(shard, self._init, generator)
        self._seen: Seen | None = None

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Returns the loss; then, in training, updates the centers."""
        if isinstance(target, Tensor) and target.is_floating_point():
            raise TypeError(
                "target must hold class indices (an integer type) where centers are sharded, "
                f"got {target.dtype}"
            )
        with torch.no_grad():
            shard = self.centers.to_local()
        shape = len(shard), self.feature_dim
        self._seen = look_at_(shard, self._seen, shape, "forward", self.centers)
        options = self._options()
        check_arguments(features, target, shard, options, self.num_classes)
        with full_precision(shard.device.type):
            batch = prepare_batch(features, target, shard, options, self.num_classes)
            update = self.training and torch.is_grad_enabled()
            with torch.no_grad():
                step = self._evaluate(batch, update=update)
            loss = with_gradients(step)
        self.last_terms = Terms(step.intra, step.inter, step.num_centers)
        return loss.reshape(features.shape[:-1]) if self.reduction == "none" else loss

    def _evaluate(self, batch: Batch, *, update: bool) -> Step:
        """One step with messages to and from the owners of centers."""
        # Each class is sent once, in order, so that classes of one shard are adjacent.
        classes, class_of_sample = batch.target.unique(return_inverse=True)
        exchange = self._exchange(classes, batch.centers.dtype == torch.float64)
        index = exchange.to_owners(classes) - self._first_row
        own = read_centers(batch.centers, simplex=self.form == "simplex", by_class=False)
        rows = exchange.from_owners(own.unit_rows(batch.centers, index))
        samples = compare(batch, rows.index_select(0, class_of_sample))
        units, valid = finite_samples(batch, samples)
        sums, counts = class_sums(units, class_of_sample, valid, len(classes))
        statistics, num_samples = _all_reduce(exchange.group, own, counts.sum())
        statistics = statistics._replace(num_classes=self.num_classes)
        step = combine(batch, samples, statistics)
        if update:
            packed = exchange.to_owners(torch.cat([sums, counts.unsqueeze(-1)], dim=-1))
            update_centers_(
                batch.centers,
                statistics,
                packed[:, :-1],
                packed[:, -1],
                index,
                center_lr=self.center_lr,
                num_samples=num_samples,
                start_zeros=True,
            )
            shard = self.centers.to_local()
            if batch.centers is not shard:
                shard.copy_(batch.centers)
            self._seen = seen_now(shard, "forward", self.centers)
        return step

    def _exchange(self, classes: Tensor, is_double: bool) -> "_Exchange":
        """Exchanges numbers of rows, given the sorted classes of this process's samples."""
        mesh = self.centers.device_mesh
        owners = classes // self._rows_each
        counts = owners.bincount(minlength=mesh.size())
        sent = torch.stack([counts, torch.full_like(counts, is_double)], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=mesh.get_group())
        sizes, doubles = torch.stack([sent, received]).permute(2, 0, 1).tolist()
        check_same_dtype(sum(doubles[1]), mesh.size())
        return _Exchange(mesh.get_group(), *sizes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedSeparateLoss":
        apply_to(self, fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_seen": None}

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return (
            f"num_classes={self.num_classes}, feature_dim={self.feature_dim}, form={self.form!r}, "
            f"center_lr={self.center_lr}, center_init={self.center_init!r}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}, "
            f"processes={self.centers.device_mesh.size()}"
        )


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


class _Exchange(NamedTuple):
    """Numbers of rows to send to, and to receive from, each process."""

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
