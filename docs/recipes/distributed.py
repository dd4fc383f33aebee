"""DistributedDataParallel: two processes, here on the CPU.

The two lines stay the same. The samples of all processes move the
centers, so that each process must call the loss in each training
step.
"""

from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from data import NUM_CLASSES, PATTERN_SIZE, batches
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from separate_loss import SoftmaxSeparateLoss

PROCESSES = 2


def train(rank: int, folder: str) -> None:
    """Trains on this process's share of each batch."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, None, PROCESSES, rank)
    model = nn.Sequential(
        nn.Linear(PATTERN_SIZE, 64),
        nn.ReLU(),
        nn.Linear(64, 16),
        nn.Linear(16, NUM_CLASSES),
    )
    criterion = SoftmaxSeparateLoss(model[-1])
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    losses = []
    for inputs, labels in batches(150):
        own = slice(rank, None, PROCESSES)  # or DistributedSampler
        loss = criterion(parallel(inputs[own]), labels[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    end = {"losses": losses, "centers": criterion.separate.centers}
    torch.save(end, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        spawn(train, (folder,), nprocs=PROCESSES)
        first = torch.load(f"{folder}/0.pt")
        second = torch.load(f"{folder}/1.pt")
    losses = first["losses"]
    centers_equal = torch.equal(first["centers"], second["centers"])
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    print(f"centers are the same in both processes: {centers_equal}")
