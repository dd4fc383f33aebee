"""Peers, taken from the quality benchmark, and candidates; each chooses from three weights."""

from functools import partial
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.beyond.losses import SEPARATIONS, Candidate
from benchmarks.quality.methods import METHODS as QUALITY_METHODS
from benchmarks.quality.methods import WEIGHTS, Method, Problem, balance

CENTER_RATE = 3.0  # of plain SGD on centers, beside the weight of the loss

SOFTMAX, PAPER = "softmax", "separate"
PEERS = {
    SOFTMAX: "softmax loss",
    "center": "+ center loss",
    "island": "+ island loss",
    "triplet": "+ triplet loss, batch-hard",
    "cosface": "CosFace head",
    PAPER: "+ separate loss, defaults but for the weight",
    "gradient": '+ separate loss, `"gradient"`',
}


def _candidate(separation: str, centred: bool, weighted: bool, problem: Problem) -> nn.Module:
    return Candidate(
        separation,
        F.normalize(torch.randn(problem.classes, problem.dim), dim=-1),
        weight=balance(problem) if weighted else None,
        centred=centred,
    )


def name_of(separation: str, *, centred: bool = False, weighted: bool = False) -> str:
    """A candidate's name, as tables show it."""
    return separation + ", centred" * centred + ", class weights" * weighted


METHODS: dict[str, Method] = {name: QUALITY_METHODS[name] for name in PEERS}
METHODS["gradient"] = METHODS["gradient"]._replace(center_rate=CENTER_RATE)
METHODS |= {
    name_of(separation, centred=centred, weighted=weighted): Method(
        partial(_candidate, separation, centred, weighted), WEIGHTS, center_rate=CENTER_RATE
    )
    for separation, centred, weighted in product(SEPARATIONS, (False, True), (False, True))
}

# Those that are compared: Eq. 3 with each addition, each other separation, and of these the best on
# the tuning parts with each addition and with both.
SINGLE = tuple(SEPARATIONS)[1:]
FIRST = (*SINGLE, name_of("centers", centred=True), name_of("centers", weighted=True))


def additions(best: str) -> tuple[str, ...]:
    """Names of a separation with each addition and with both."""
    return (
        name_of(best, centred=True),
        name_of(best, weighted=True),
        name_of(best, centred=True, weighted=True),
    )
