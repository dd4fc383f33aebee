"""What timm and others need of torchvision."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["complete_torchvision"]


@cache
def complete_torchvision() -> None:
    """Lets torchvision be imported where its compiled operators do not fit torch.

    timm needs torchvision, and the others import it where it is installed. Its wheels are built
    against CUDA. Beside a CPU build of torch their operators do not load, which torchvision allows
    for, but its import registers shapes for two of them that must have been declared. Declared here
    without a kernel, they fail when called, not before; only detection models call them.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(library)
    except OSError:
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
