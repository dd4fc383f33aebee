"""Which form of the step serves: the operators of `eager`, or the kernels of `fused`.

The environment variable SEPARATE_LOSS_OPS, read once at import, is "auto", "eager" or "fused".
Under "fused", what the kernels are made for runs on them or says why it cannot; what they are not
made for goes to the eager form in any case.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from separate_loss._checks import check_choice
from separate_loss._torch import RELEASE, in_transform

CHOICE = os.environ.get("SEPARATE_LOSS_OPS", "auto")
check_choice("SEPARATE_LOSS_OPS", CHOICE, ("auto", "eager", "fused"))

# The largest batch for which "auto" takes the kernels, on CUDA: docs/kernels.md has the figures.
AUTO_SAMPLES = 4096

# What the kernels need of Triton came in 3.4, beside torch 2.8.
HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None and RELEASE >= (2, 8)
PLAIN = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A program holds a row of features, and looks for the samples of a class one by one.
MOST_FEATURES, MOST_SAMPLES = 2**14, 2**14


def may_fuse(centers: object) -> bool:
    """Whether the kernels come into question at all, for arguments that nobody checked yet."""
    if CHOICE == "auto":
        # What torch.compile makes of the operators is as fast but for very many classes.
        return HAS_TRITON and getattr(centers, "is_cuda", False) and not is_compiling()
    return CHOICE == "fused"


def kernels_for(features: Tensor, target: Tensor, centers: Tensor) -> ModuleType | None:
    """The module `fused` where it serves these arguments, else None.

    Raises:
        RuntimeError: SEPARATE_LOSS_OPS=fused, and the kernels cannot run on them.

    """
    auto = CHOICE == "auto"
    if target.is_floating_point() or target.numel() > (AUTO_SAMPLES if auto else MOST_SAMPLES):
        return None
    if centers.shape[1] > MOST_FEATURES:
        return None
    if not is_compiling() and in_transform():
        return None
    hindrance = _hindrance(features, centers)
    if hindrance is None:
        from separate_loss.ops import fused  # noqa: PLC0415 - brings Triton

        if auto:
            # Fake tensors and the like stand for others, and start nothing.
            plain = type(features) in PLAIN and type(centers) in PLAIN
            return fused if plain and fused.works_on(centers.device) else None
        if centers.is_cuda or fused.INTERPRETED:
            return fused
        hindrance = (
            f"tensors on {centers.device}, which needs Triton's interpreter: TRITON_INTERPRET=1"
        )
    if auto:
        return None
    raise RuntimeError(f"SEPARATE_LOSS_OPS=fused cannot run: {hindrance}")


def _hindrance(features: Tensor, centers: Tensor) -> str | None:
    if not HAS_TRITON:
        return "no Triton for CUDA is installed, or torch is older than 2.8"
    for tensor in (features, centers):
        if tensor.dtype not in DTYPES:
            return f"a tensor of {tensor.dtype}; expected {', '.join(map(str, DTYPES))}"
    return None
