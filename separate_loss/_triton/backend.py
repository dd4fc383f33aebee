"""Decides whether the Triton kernels run a step.

The environment variable SEPARATE_LOSS_BACKEND is read once, at import. "auto" takes the kernels
where they are faster, "torch" never. "triton" takes them for all arguments that they support, and
raises where the machine cannot run them; PyTorch's operators run all other steps.
"""

import os
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_compiling

from separate_loss._batch import Options
from separate_loss._checks import check_choice
from separate_loss._torch import RELEASE, in_transform

BACKEND = os.environ.get("SEPARATE_LOSS_BACKEND", "auto")
check_choice("SEPARATE_LOSS_BACKEND", BACKEND, ("auto", "torch", "triton"))

# The largest batch for which "auto" takes the kernels, on CUDA: docs/cost.md has the figures.
AUTO_MAX_SAMPLES = 4096
# A program holds a row of features, and looks for the samples of a class one by one.
MAX_FEATURES, MAX_SAMPLES = 2**14, 2**14
# What the kernels need of Triton came in 3.4, beside torch 2.8.
HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None and RELEASE >= (2, 8)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kernels_for(
    features: Tensor, target: Tensor, centers: Tensor, options: Options
) -> ModuleType | None:
    """The module of the kernels, if they are to run this step, else None.

    Raises:
        RuntimeError: SEPARATE_LOSS_BACKEND=triton, and the machine cannot run the kernels.

    """
    auto = BACKEND == "auto"
    # Compiled operators are as fast but for very many classes.
    if BACKEND == "torch" or (auto and not (HAS_TRITON and centers.is_cuda and not is_compiling())):
        return None
    max_samples = AUTO_MAX_SAMPLES if auto else MAX_SAMPLES
    if not _supports(target, centers, options) or target.numel() > max_samples:
        return None
    reason = _unsupported_reason(features, centers)
    if reason is None:
        from separate_loss._triton import step  # noqa: PLC0415 - imports Triton

        if auto:
            # Tensor subclasses, as fake tensors, may have no memory.
            plain = type(features) in PLAIN_TYPES and type(centers) in PLAIN_TYPES
            return step if plain and step.works_on(centers.device) else None
        if centers.is_cuda or step.INTERPRETED:
            return step
        reason = (
            f"tensors on {centers.device}, which needs Triton's interpreter: TRITON_INTERPRET=1"
        )
    if auto:
        return None
    raise RuntimeError(f"SEPARATE_LOSS_BACKEND=triton cannot run: {reason}")


def _supports(target: Tensor, centers: Tensor, options: Options) -> bool:
    """Whether the kernels compute what is asked for."""
    plain = options.form == "paper" and options.weight is None and options.label_smoothing == 0
    indices = options.reduction == "mean" and not target.is_floating_point()
    transformed = not is_compiling() and in_transform()
    return plain and indices and centers.shape[1] <= MAX_FEATURES and not transformed


def _unsupported_reason(features: Tensor, centers: Tensor) -> str | None:
    if not HAS_TRITON:
        return "no Triton for CUDA is installed, or torch is older than 2.8"
    for tensor in (features, centers):
        if tensor.dtype not in DTYPES:
            return f"a tensor of {tensor.dtype}; expected {', '.join(map(str, DTYPES))}"
    return None
