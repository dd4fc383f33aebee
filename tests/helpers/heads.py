"""A small classifier with a loss on its head, and the modes in which both are called."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss
from separate_loss.functional import intra_class_loss

INPUT_DIM, FEATURE_DIM, NUM_CLASSES = 5, 6, 4
CENTERS = torch.nn.functional.normalize(
    torch.randn(NUM_CLASSES, FEATURE_DIM, generator=torch.Generator().manual_seed(1)), dim=-1
)
TARGET = torch.arange(6) % NUM_CLASSES
MODES = ["graph", "no_grad", "inference", "compiled", "compiled without a graph"]


def model_and_loss(**options: Any) -> tuple[nn.Sequential, SoftmaxSeparateLoss]:
    model = nn.Sequential(nn.Linear(INPUT_DIM, FEATURE_DIM), nn.Linear(FEATURE_DIM, NUM_CLASSES))
    return model, SoftmaxSeparateLoss(model[-1], **({"center_init": CENTERS} | options))


def inputs_of(*sizes: int) -> Tensor:
    """Inputs for the model; 6 samples without sizes, as many as `TARGET` has."""
    return torch.randn(*(sizes or (len(TARGET),)), INPUT_DIM)


def in_mode(mode: str, model: nn.Module) -> tuple[Callable[..., Any], AbstractContextManager[Any]]:
    """The function that runs the model in a mode, and the context for model and loss."""
    contexts: dict[str, AbstractContextManager[Any]] = {
        "no_grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "compiled without a graph": torch.no_grad(),
    }
    call: Callable[..., Any] = model
    if "compiled" in mode:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    return call, contexts.get(mode, nullcontext())


def intra_of(features: Tensor, target: Tensor) -> Tensor:
    """The intra-class loss of features with `CENTERS`."""
    with torch.no_grad():
        return intra_class_loss(features.clone(), target, CENTERS)
