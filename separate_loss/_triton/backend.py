"""Decides whether the Triton kernels run a step.

The environment variable SEPARATE_LOSS_BACKEND is read once, at import. "auto" takes the kernels on
CUDA, where a trial step equals one by PyTorch's operators; "torch" never. "triton" takes them for
all arguments that they support, and raises where the machine cannot run them; PyTorch's operators
run all other steps.
"""

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from separate_loss._batch import Options
from separate_loss._checks import check_choice
from separate_loss._torch import RELEASE
from separate_loss._tracing import in_eager

BACKEND = os.environ.get("SEPARATE_LOSS_BACKEND", "auto")
check_choice("SEPARATE_LOSS_BACKEND", BACKEND, ("auto", "torch", "triton"))

# A program holds a row of features; another reads all labels.
MAX_FEATURES, MAX_SAMPLES = 2**14, 2**14
# What the kernels need of Triton came in 3.4, beside torch 2.8.
HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None and RELEASE >= (2, 8)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

RunStep = Callable[..., Any]  # `_step.run_step`

works: dict[torch.device, bool] = {}


def kernels_for(
    features: Tensor, target: Tensor, centers: Tensor, options: Options, run_step: RunStep
) -> ModuleType | None:
    """The module of the kernels, if they are to run this step, else None.

    `run_step` runs a trial step.

    Raises:
        RuntimeError: SEPARATE_LOSS_BACKEND=triton, and the machine cannot run the kernels.

    """
    auto, weight = BACKEND == "auto", options.weight
    if BACKEND == "torch" or (auto and not (HAS_TRITON and centers.is_cuda)):
        return None
    given = (features, target, centers) if weight is None else (features, target, centers, weight)
    supported = (
        options.reduction == "mean"
        and not target.is_floating_point()
        and centers.shape[1] <= MAX_FEATURES
        and target.numel() <= MAX_SAMPLES
        and not (weight is not None and weight.requires_grad)
        # Tensors of other types, such as fake tensors, may have no memory.
        and all(type(one) in PLAIN_TYPES for one in given)
        and in_eager()
    )
    if not supported:
        return None
    others = [one.dtype for one in given if one.is_floating_point() and one.dtype not in DTYPES]
    if not HAS_TRITON:
        reason = "no Triton for CUDA is installed, or torch is older than 2.8"
    elif others:
        reason = f"a tensor of {others[0]}; expected {', '.join(map(str, DTYPES))}"
    else:
        from separate_loss._triton import step  # noqa: PLC0415 - imports Triton

        if centers.is_cuda or step.INTERPRETED:
            return step if not auto or works_on(centers.device, run_step) else None
        needed = "which needs Triton's interpreter: TRITON_INTERPRET=1"
        reason = f"tensors on {centers.device}, {needed}"
    if auto:
        return None
    raise RuntimeError(f"SEPARATE_LOSS_BACKEND=triton cannot run: {reason}")


def works_on(device: torch.device, run_step: RunStep) -> bool:
    """Whether trial steps by the kernels equal those by operators on a GPU; warns once if not."""
    from separate_loss._triton import step  # noqa: PLC0415 - imports Triton

    if device in works or torch.cuda.is_current_stream_capturing():  # a trial waits for the device
        return works.get(device, False)
    works[device] = False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    for direct in (step.direct, False):
        step.direct = direct
        try:
            _try_on(device, run_step, step)
        except Exception as error:  # compilers, linkers and drivers raise errors of many types
            reason = error
        else:
            works[device] = True
            return True
    text = "separate_loss runs without its Triton kernels, which fail here"
    warnings.warn(f"{text}: {reason}", stacklevel=2)
    return False


@torch.inference_mode(False)
@torch.enable_grad()
def _try_on(device: torch.device, run_step: RunStep, kernels: ModuleType) -> None:
    """Raises if steps by the kernels, and again by their binaries, differ from the operators'."""
    target = torch.arange(12, device=device) % 5  # 4 is ignored
    for form, dtype, smoothing in (("paper", torch.float64, 0.0), ("simplex", torch.float32, 0.1)):
        values = torch.arange(1, 61, device=device, dtype=dtype)
        features, centers = values.sin().view(12, 5), (values * values).sin().view(12, 5)
        weight = values[:7] / 7 if smoothing else None
        options, outcomes = Options(form, weight, 4, label_smoothing=smoothing), []  # type: ignore[arg-type]
        for module in (None, kernels, kernels):
            leaf, moved = features.clone().requires_grad_(), centers[:7].clone()
            moved[6] = 0
            step = run_step(leaf, target, moved, options, choose=lambda *_, one=module: one)
            (gradient,) = torch.autograd.grad(step.loss * 12, leaf)
            step.update_(moved, None, start_zeros=True)
            outcomes.append((step.loss.detach(), gradient, moved))
        for found in outcomes[1:]:
            torch.testing.assert_close(found, outcomes[0], rtol=0, atol=2e-3)  # float32 or TF32
