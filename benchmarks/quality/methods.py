"""The losses that are compared, and the weights (or margins) that each is tuned from."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from pytorch_metric_learning.losses import CosFaceLoss
from torch import Tensor, nn

from benchmarks.baselines import BatchHardTripletLoss, CenterLoss, IslandLoss
from separate_loss import SeparateLoss

PAPER_WEIGHT = 0.9
# Of the other forms: what the tuning parts of all data chose.
WEIGHT = 1.0
# Weights that are tried next where the best so far is the first or the last.
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
MARGINS = (0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65)


class Problem(NamedTuple):
    """What a loss is built for."""

    counts: Tensor  # of each class's training samples, (C,)
    feature_dim: int
    weight: float

    @property
    def classes(self) -> int:
        return len(self.counts)


class Method(NamedTuple):
    """`start` are the candidates at first, `ladder` those that may follow.

    Parameters of the criterion are moved by plain SGD at `center_rate`.
    """

    title: str
    build: Callable[[Problem], nn.Module | None]
    start: tuple[float, ...] = ()
    ladder: tuple[float, ...] = LADDER
    center_rate: float = 0.5
    is_head: bool = False  # takes the place of the linear layer and of softmax loss


class CosineHead(nn.Module):
    """The scaled cosines of a margin loss, as logits."""

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.criterion.get_logits(features)
        return logits


def _cosface(problem: Problem) -> nn.Module:
    criterion: nn.Module = CosFaceLoss(
        problem.classes, problem.feature_dim, margin=problem.weight, scale=16
    )
    return criterion


class NormPenalty(nn.Module):
    """Half the mean squared norm of the features: what center loss does to their size."""

    def forward(self, features: Tensor, _: Tensor) -> Tensor:
        return features.square().sum(-1).mean() / 2


def balance(counts: Tensor) -> Tensor:
    """Class weights under which all classes count the same in L_intra."""
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def _separate(problem: Problem, *, balanced: bool = False, **options: Any) -> nn.Module:
    if balanced:
        options["weight"] = balance(problem.counts)
    return SeparateLoss(problem.classes, problem.feature_dim, **options)


# Said in full, whatever the defaults are.
PAPER: dict[str, Any] = {"scale_free": False, "separation": "mean"}
FREE: dict[str, Any] = {"scale_free": True, "separation": "mean"}
SQUARE: dict[str, Any] = {"scale_free": True, "separation": "square"}
STARTS = (0.3, 1.0, 3.0)
PAPER_STARTS = (PAPER_WEIGHT, 3.0, 10.0)

METHODS: dict[str, Method] = {
    "softmax": Method("softmax loss", lambda _: None),
    "center": Method(
        "+ center loss", lambda it: CenterLoss(it.classes, it.feature_dim), (0.03, 0.1, 0.3)
    ),
    "island": Method(
        "+ island loss", lambda it: IslandLoss(it.classes, it.feature_dim), (0.003, 0.01, 0.03)
    ),
    "triplet": Method("+ batch-hard triplet", lambda _: BatchHardTripletLoss(), (0.03, 0.1, 0.3)),
    "cosface": Method("CosFace", _cosface, (0.1, 0.2, 0.35), MARGINS, is_head=True),
    "paper": Method(
        "+ separate, paper's form",
        partial(_separate, **PAPER),
        PAPER_STARTS,
        (0.1, 0.3, *PAPER_STARTS, 30.0, 100.0),
    ),
    "free": Method("+ separate, `scale_free`", partial(_separate, **FREE), STARTS),
    "square": Method('+ separate, `scale_free`, `"square"`', partial(_separate, **SQUARE), STARTS),
    "balanced": Method(
        "the same, class weights", partial(_separate, balanced=True, **SQUARE), STARTS
    ),
    "norm": Method("+ half the squared norm", lambda _: NormPenalty(), (0.01, 0.03, 0.1)),
    "gradient": Method(
        "the same, centers by SGD at 3",
        partial(_separate, center_update="gradient", **SQUARE),
        STARTS,
        center_rate=3.0,
    ),
}
