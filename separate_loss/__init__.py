"""The separate loss of Li et al. (ACML 2019) for PyTorch: compact classes, far apart."""

from separate_loss import functional, metrics
from separate_loss._modules import SeparateLoss, Terms
from separate_loss._softmax import SoftmaxSeparateLoss, SoftmaxSeparateTerms
from separate_loss.functional import separate_loss

__all__ = [
    "SeparateLoss",
    "SoftmaxSeparateLoss",
    "SoftmaxSeparateTerms",
    "Terms",
    "functional",
    "metrics",
    "separate_loss",
]
__version__ = "0.2.0"
