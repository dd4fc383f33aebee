"""What decides the outcome of a run."""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from benchmarks.training import FeatureKind

DataName = Literal["digits", "faces"]
KINDS: tuple[FeatureKind, ...] = ("signed", "non-negative")


@dataclass(frozen=True)
class Setting:
    """One training; `strength` is the weight of the method's loss, or its margin."""

    data: DataName
    kind: FeatureKind
    method: str
    strength: float
    rate: float  # of the network, the highest of its schedule
    epochs: int
    batch_size: int
    feature_dim: int
    seed: int
    tuning: bool = False  # measured on the part to tune on, not on the one to report

    def key(self) -> str:
        """A name that says it all."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


class Scale(NamedTuple):
    """How much is run; each method has the same number of candidates everywhere."""

    faces: int  # to train on, at most
    epochs: dict[DataName, int]
    seeds: dict[DataName, int]  # of the main table
    tuning_seeds: dict[DataName, int]
    sweep_seeds: dict[DataName, int]  # of weights and feature sizes
    batch_seeds: int  # of batch sizes
    weights: tuple[float, ...]
    feature_dims: tuple[int, ...]
    batch_sizes: tuple[int, ...]


FULL = Scale(
    faces=8000,
    epochs={"digits": 60, "faces": 8},
    seeds={"digits": 10, "faces": 5},
    tuning_seeds={"digits": 5, "faces": 1},
    sweep_seeds={"digits": 5, "faces": 1},
    batch_seeds=2,
    weights=tuple(tenths / 10 for tenths in range(1, 12)),
    feature_dims=(64, 128, 256, 512, 768, 1024),
    batch_sizes=(20, 400),
)
QUICK = Scale(
    faces=1000,
    epochs={"digits": 20, "faces": 3},
    seeds={"digits": 3, "faces": 2},
    tuning_seeds={"digits": 1, "faces": 1},
    sweep_seeds={"digits": 1, "faces": 1},
    batch_seeds=1,
    weights=(0.1, 0.5, 0.9),
    feature_dims=(64, 1024),
    batch_sizes=(20, 400),
)

RATES = (0.003, 0.01, 0.03)  # softmax loss alone chooses, and all methods take what it chose
BATCH_SIZE: dict[DataName, int] = {"digits": 32, "faces": 100}
FEATURE_DIM: dict[DataName, int] = {"digits": 64, "faces": 128}
PAPER_WEIGHT = 0.9
