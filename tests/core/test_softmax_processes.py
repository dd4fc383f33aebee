"""Two processes with each option of DistributedDataParallel train as one process."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from separate_loss import SoftmaxSeparateLoss
from tests.helpers.processes import run_in

OPTIONS: dict[str, dict[str, Any]] = {
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "broadcast_buffers": {"broadcast_buffers": False},
    "backward hooks": {},
    "cast after the model": {},
}


class Model(nn.Module):
    """A model with a layer that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.unused, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(inputs).tanh())
        return logits


def train(rank: int, size: int, name: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model().double()
    criterion = SoftmaxSeparateLoss(model.head, dtype=torch.float64)
    if name == "backward hooks":
        model.register_full_backward_hook(lambda *_: None)
    if name != "find_unused_parameters":
        del model.unused
    call: Any = DistributedDataParallel(model, **OPTIONS[name]) if size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        inputs, target = torch.randn(8, 6).double().requires_grad_(), torch.randint(5, (8,))
        part = slice(rank * 8 // size, (rank + 1) * 8 // size)
        logits = call(inputs[part])
        loss = criterion(logits.double().clone() if "cast" in name else logits, target[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses)
    if size > 1:
        dist.all_reduce(mean)
    with torch.no_grad():
        criterion.eval()(call(inputs).float(), target)
    weight = model.head.weight.detach()
    return {"losses": mean / size, "weight": weight, "centers": criterion.separate.centers}


def train_in_all(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    return {name: train(rank, size, name) for name in OPTIONS}


@functools.cache
def results(size: int) -> list[dict[str, dict[str, Tensor]]]:
    return run_in(size, train_in_all)


@pytest.mark.parametrize("name", OPTIONS)
def test_two_processes_train_as_one(name: str) -> None:
    alone = results(1)[0][name]
    for part in results(2):
        torch.testing.assert_close(part[name], alone)
