"""Sharded centers: saved, merged, and resumed on fewer processes.

Each process holds a part of the centers. A checkpoint of them loads
on any number of processes, and on one process without sharding.
"""

from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from separate_loss import SoftmaxSeparateLoss
from separate_loss.sharded import ShardedSeparateLoss


def train(rank: int, size: int, end: str, start: str | None) -> None:
    """Trains in one of `size` processes, and saves in `end`."""
    store = f"file://{end}-store"
    dist.init_process_group("gloo", store, None, size, rank)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(PATTERN_SIZE, 16),
        nn.Linear(16, NUM_CLASSES),
    )
    separate = ShardedSeparateLoss(NUM_CLASSES, feature_dim=16)
    criterion = SoftmaxSeparateLoss(model[-1], separate=separate)
    state = {"model": model, "loss": criterion}
    if start is not None:
        load(state, checkpoint_id=start)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for inputs, labels in batches(75):
        own = slice(rank, None, size)
        loss = criterion(parallel(inputs[own]), labels[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save(state, checkpoint_id=end)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    head, found = nn.Linear(16, NUM_CLASSES), []
    with TemporaryDirectory() as folder:
        first, second = f"{folder}/first", f"{folder}/second"
        spawn(train, (2, first, None), nprocs=2)
        train(0, 1, second, start=first)
        for saved in (first, second):  # merged in one process
            state = {"loss": (merged := SoftmaxSeparateLoss(head))}
            load(state, checkpoint_id=saved, no_dist=True)
            found.append(merged.separate.centers)
    kept = torch.cosine_similarity(found[0], found[1]).min().item()
    print(f"cosines of centers before and after resuming: {kept:.3f}")
