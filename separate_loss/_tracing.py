"""What depends on how code runs: eagerly, in the compiler, or under a transform of torch.func."""

import torch
from torch import Tensor
from torch.nn import Parameter

from separate_loss._torch import in_transform, under_vmap


def has_values(tensor: Tensor) -> bool:
    """Whether Python can read the values at once: on the CPU, outside of tracing and vmap."""
    plain = tensor.is_cpu and type(tensor) in (Tensor, Parameter)
    return plain and not torch.compiler.is_compiling() and not under_vmap(tensor)


def in_eager() -> bool:
    """Whether code runs outside of the compiler, of torch.func and of forward mode."""
    return not torch.compiler.is_compiling() and not in_transform()
