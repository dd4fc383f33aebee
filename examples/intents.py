"""Trains an intent classifier on few labels with and without the separate loss, and compares.

python -m examples.intents PATH, of BANKING77 or CLINC150
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.data import Split, drawn, intents
from benchmarks.harness import format_interval, paired_interval
from separate_loss import SoftmaxSeparateLoss


def train(training: Split, test: Split, seed: int, weight: float | None, epochs: int) -> float:
    """Trains with softmax loss, or with both; returns the accuracy in %."""
    num_classes = int(training.labels.max()) + 1
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.EmbeddingBag(intents.WORDS, 128, mode="mean", padding_idx=0), nn.ReLU()),
        *(nn.Dropout(0.3), nn.Linear(128, 128)),
        nn.Linear(128, num_classes),
    )
    criterion: nn.Module = nn.CrossEntropyLoss()
    if weight is not None:
        criterion = SoftmaxSeparateLoss(model[-1], separate_weight=weight)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    steps = epochs * len(training.labels.split(64))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(training.labels)).split(64):
            loss = criterion(model(training.images[rows]), training.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        correct = model.eval()(test.images).argmax(1) == test.labels
    return float(100 * correct.double().mean())


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, trains under each seed and prints the difference."""
    parser = argparse.ArgumentParser(prog="python -m examples.intents", description=__doc__)
    parser.add_argument("path", type=Path, help="a JSON file, or a folder with two csv files")
    parser.add_argument("--labels", type=int, default=10, help="sentences of each intent")
    parser.add_argument("--weight", type=float, default=1.0, help="of the separate loss")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each, two or more")
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args(arguments)
    if min(options.labels, options.epochs, options.seeds - 1) < 1:
        parser.error("--labels and --epochs must be at least 1, and --seeds at least 2")
    try:
        parts = intents.load(options.path)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # threads would wait for one another on so small a model
    counts = [options.labels] * (int(parts["train"].labels.max()) + 1)
    print(f"{len(counts)} intents, {options.labels} labels each; accuracy on the test part, %")
    drawings = [drawn(parts["train"], counts, seed) for seed in range(options.seeds)]
    found = []
    for title, weight in (("softmax loss", None), ("with the separate loss", options.weight)):
        runs = ((one, parts["test"], seed, weight) for seed, one in enumerate(drawings))
        found.append([train(*run, options.epochs) for run in runs])
        print(f"{title}: {' '.join(f'{value:.1f}' for value in found[-1])}", flush=True)
    difference = format_interval(paired_interval(found[1], found[0]))
    print(f"Difference, with its 95 % interval, paired by seed: {difference}")


if __name__ == "__main__":
    main()
