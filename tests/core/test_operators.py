"""How many operators a training step runs, which is what it costs where a host feeds a device."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from separate_loss import SeparateLoss, SoftmaxSeparateLoss

# Operators that compute nothing, by the beginnings of their names.
VIEWS = (
    "view", "reshape", "expand", "unsqueeze", "squeeze", "detach", "alias", "t.", "transpose",
    "select", "slice", "_unsafe_view", "permute", "split", "as_strided", "lift_fresh", "unbind",
    "_local_scalar", "empty", "new_empty", "movedim",
)  # fmt: skip


class Count(TorchDispatchMode):
    """Counts the operators that compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1] + "."
        self.found[name] += not name.startswith(VIEWS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("most", "num_classes", "joint", "options"),
    [
        (60, 7, False, {}),
        (50, 7, False, {"form": "paper"}),
        (75, 7, True, {}),
        (85, 7, True, {"label_smoothing": 0.1}),
        (85, 7, True, {"weight": torch.rand(7)}),
        (100, 10_000, False, {}),
    ],
    ids=["simplex", "paper", "joint", "smoothing", "weights", "many classes"],
)
def test_a_training_step_runs_few_operators(
    most: int, num_classes: int, joint: bool, options: dict[str, Any]
) -> None:
    start = torch.nn.functional.normalize(torch.randn(num_classes, 512), dim=-1)
    head = torch.nn.Linear(512, num_classes)
    options = {"center_init": start, **options}
    criterion: Any = SeparateLoss(num_classes, 512, **options)
    if joint:
        criterion = SoftmaxSeparateLoss(head, **options)
    features = torch.randn(128, 512, requires_grad=True)
    target = torch.randint(num_classes, (128,))

    def step() -> None:
        features.grad = None
        head.zero_grad()
        criterion(head(features) if joint else features, target).backward()

    step()
    with Count() as count:
        step()
    assert sum(count.found.values()) <= most, count.found
