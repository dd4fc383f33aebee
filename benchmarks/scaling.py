"""What a step of `ShardedSeparateLoss` moves and holds, on paper: the tables of docs/scaling.md.

python -m benchmarks.scaling

Nothing is measured here. The collectives are those of separate_loss/sharded.py, which the tests
compare with `sent`; speeds are assumptions, below.
"""

from math import ceil, log2
from typing import NamedTuple

FEATURE_DIM = 512
SAMPLES = 256
CLASS_COUNTS = (10**7, 10**8)
GPU_COUNTS = (8, 64, 256, 1024)
FLOAT, INT = 4, 8  # bytes of a float32 and of an int64

# Assumed, not measured: data sheet figures, and one guess.
MEMORY_SPEED = 3.35e12  # bytes per second of an H100's HBM3
LINK_SPEED = {8: 450e9}  # one way, NVLink between 8 GPUs;
NETWORK_SPEED = 50e9  # beyond them one 400 Gb/s InfiniBand port per GPU, for all bytes
MESSAGE_TIME = 2e-6  # a message between two GPUs, apart from its bytes: the guess

# Readings and writings of all of a shard's centers in a step.
PASSES_EAGER = 7  # norms, sum; products with the sum, mul_ (2), addcmul_ (2)
PASSES_FUSED = 3  # norms and sum at once; read and write at once


class Collective(NamedTuple):
    """One call on one process."""

    name: str  # as torch.distributed's operator
    what: str
    size: int  # bytes given to it

    def bytes_out(self, gpus: int) -> float:
        """What leaves the GPU: its part of a ring for a sum, the parts of others otherwise."""
        return self.size * (gpus - 1) / gpus * (2 if self.name == "allreduce_" else 1)

    def messages(self, gpus: int) -> int:
        """What leaves one after another: up and down a tree for a sum, one to each otherwise."""
        return 2 * ceil(log2(gpus)) if self.name == "allreduce_" else gpus - 1


def sent(samples: int, feature_dim: int, gpus: int) -> list[Collective]:
    """The collectives of a training step, where each GPU's samples are of different classes.

    As many of these classes lie on this GPU as on any other; fewer classes send less.
    """
    return [
        Collective("alltoall_base_", "how many classes go where, float type", 2 * gpus * INT),
        Collective("alltoall_base_", "classes", samples * INT),
        Collective("alltoall_base_", "their unit centers", samples * feature_dim * FLOAT),
        Collective("allreduce_", "sum of unit centers, two counts", (feature_dim + 2) * FLOAT),
        Collective("alltoall_base_", "sums and counts", samples * (feature_dim + 1) * FLOAT),
    ]


def table(header: str, rows: list[list[str]]) -> None:
    """Prints Markdown."""
    columns = header.split(" | ")
    for cells in (columns, ["---:"] * len(columns), *rows):
        print("|", " | ".join(cells), "|")
    print()


def centers_time(num_classes: int, gpus: int, passes: int) -> float:
    """Seconds to read and write a GPU's centers."""
    return passes * ceil(num_classes / gpus) * FEATURE_DIM * FLOAT / MEMORY_SPEED


def message_time(gpus: int) -> float:
    """Seconds in which a GPU's messages leave, apart from their bytes."""
    return sum(one.messages(gpus) for one in sent(SAMPLES, FEATURE_DIM, gpus)) * MESSAGE_TIME


def step(num_classes: int, gpus: int) -> list[str]:
    """Memory and time per GPU."""
    size = ceil(num_classes / gpus) * FEATURE_DIM * FLOAT
    moved = sum(one.bytes_out(gpus) for one in sent(SAMPLES, FEATURE_DIM, gpus))
    times = (
        centers_time(num_classes, gpus, PASSES_EAGER),
        centers_time(num_classes, gpus, PASSES_FUSED),
        moved / LINK_SPEED.get(gpus, NETWORK_SPEED),
        message_time(gpus),
    )
    milliseconds = (f"{1e3 * seconds:.3g}" for seconds in times)
    return [f"{num_classes:,}", str(gpus), f"{size / 1e9:.3g}", *milliseconds]


def most_gpus(num_classes: int, passes: int) -> int:
    """The last count of GPUs at which the centers take longer than the messages."""
    gpus = 1
    while centers_time(num_classes, gpus + 1, passes) > message_time(gpus + 1):
        gpus += 1
    return gpus


def traffic(gpus: int) -> list[str]:
    """What one GPU sends in a step, sharded and by two other ways."""
    collectives = sent(SAMPLES, FEATURE_DIM, gpus)
    sharded = sum(one.bytes_out(gpus) for one in collectives)
    # All features to all and a sum of all rows back, in rings.
    gathered = 2 * (gpus - 1) * SAMPLES * FEATURE_DIM * FLOAT
    whole = [2 * (gpus - 1) / gpus * count * (FEATURE_DIM + 1) * FLOAT for count in CLASS_COUNTS]
    worst = gpus * SAMPLES * (FEATURE_DIM + 1) * FLOAT
    figures = [f"{size / 1e6:,.1f}" for size in (sharded, gathered, *whole, worst)]
    return [str(gpus), str(sum(one.messages(gpus) for one in collectives)), *figures]


def main() -> None:
    """Prints all tables."""
    print("Collectives of a training step, bytes that a GPU gives to them:\n")
    rows = [
        [one.what, one.name, *(str(sent(SAMPLES, FEATURE_DIM, k)[i].size) for k in GPU_COUNTS)]
        for i, one in enumerate(sent(SAMPLES, FEATURE_DIM, 1))
    ]
    table("what | operator | " + " | ".join(f"{k} GPUs" for k in GPU_COUNTS), rows)
    print("Messages and MB that leave a GPU in a step:\n")
    table(
        "GPUs | messages | MB | MB, batch to all | MB, sums of 10^7 classes | MB, of 10^8 "
        "| most MB that can arrive",
        [traffic(gpus) for gpus in GPU_COUNTS],
    )
    print("GB of centers and ms of a step on each GPU:\n")
    table(
        "classes | GPUs | GB | centers, eager | centers, fused | bytes sent | messages",
        [step(count, gpus) for count in CLASS_COUNTS for gpus in GPU_COUNTS],
    )
    print("GPUs up to which centers take longer than messages:\n")
    table(
        "classes | eager | fused",
        [
            [f"{count:,}", *(str(most_gpus(count, n)) for n in (PASSES_EAGER, PASSES_FUSED))]
            for count in CLASS_COUNTS
        ],
    )


if __name__ == "__main__":
    main()
