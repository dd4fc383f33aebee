"""What all data sets have in common."""

from typing import Literal, NamedTuple

from torch import Tensor

__all__ = ["FeatureKind", "Split"]

# Signed; after ReLU and pooling; or these behind BatchNorm1d.
FeatureKind = Literal["signed", "non-negative", "neck"]


class Split(NamedTuple):
    images: Tensor  # or texts, (N, ...)
    labels: Tensor  # (N,)
