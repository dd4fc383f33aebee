"""Which models of timm work with the one line of the recipe: `python -m benchmarks heads`.

Of each of timm's modules the smallest model, by parameters, with new weights and two images. The
features that `SoftmaxSeparateLoss` finds are compared with those that timm itself returns before
the classifier. Needs the extra `recipes`.
"""

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.report import environment, provenance, table, write
from benchmarks.vision import complete_torchvision
from separate_loss import SoftmaxSeparateLoss

__all__ = ["main"]

NUM_CLASSES = 7
# Of a module's models, how many are built to find the smallest.
CANDIDATES = 6
# Larger ones are left out, for memory.
MOST_PARAMETERS = 150_000_000


class Outcome(NamedTuple):
    """What became of a model."""

    module: str
    model: str
    parameters: int
    head: str
    result: str
    negative: str  # the share of negative features


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, tries the models and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks heads", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--modules", nargs="+", help="of timm; all by default")
    parser.add_argument("--output", type=Path, default=Path("build/heads.md"))
    options = parser.parse_args(arguments)
    complete_torchvision()
    outcomes = []
    for module, name in _models(options.modules):
        outcomes.append(_try(module, name))
        print(" | ".join(map(str, outcomes[-1])), flush=True)
    write(options.output, _page(outcomes))
    print(f"Page: {options.output}")


def _models(modules: list[str] | None) -> Iterator[tuple[str, str]]:
    """Modules of timm, each with the name of its smallest model."""
    import timm  # noqa: PLC0415 - takes seconds, and needs the extra

    for module in modules or timm.list_modules():
        names = timm.list_models(module=module)
        # Names grow with the model, as in `resnet18` and `resnet18_pruned_and_more`.
        names = sorted(names, key=lambda name: (not name.startswith("test_"), len(name)))
        sizes = {}
        for name in names[:CANDIDATES]:
            with torch.device("meta"), warnings.catch_warnings(action="ignore"):
                try:
                    sizes[name] = _count(timm.create_model(name, num_classes=NUM_CLASSES))
                except (NotImplementedError, RuntimeError):  # reads values while it is built
                    continue
        smallest = min(sizes, key=lambda name: sizes[name], default="")
        if smallest and sizes[smallest] <= MOST_PARAMETERS:
            yield module, smallest
        else:
            print(f"{module} | left out", flush=True)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _try(module: str, name: str) -> Outcome:
    import timm  # noqa: PLC0415

    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):
        model: Any = timm.create_model(name, num_classes=NUM_CLASSES).eval()
        head = model.get_classifier()
        images = torch.randn(2, *model.default_cfg["input_size"])
        result, features = _result(model, head, images)
    negative = "" if features is None else f"{features.lt(0).double().mean():.0%}"
    kind = " and ".join(type(one).__name__ for one in head) if isinstance(head, tuple) else ""
    return Outcome(module, name, _count(model), kind or type(head).__name__, result, negative)


def _result(model: Any, head: Any, images: Tensor) -> tuple[str, Tensor | None]:
    """`right`, or what is wrong, and the features that timm returns."""
    truth = model.forward_head(model.forward_features(images), pre_logits=True)
    truth = truth if isinstance(truth, Tensor) else None  # some return several
    try:
        criterion = SoftmaxSeparateLoss(head)
        criterion(model(images), torch.arange(2)).backward()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"refused: {re.split('[;,]', str(error))[0]}", truth
    given = SoftmaxSeparateLoss(head, center_update="none", center_init="sphere")
    given.separate.load_state_dict(criterion.separate.state_dict())
    found, expected = given(model(images), torch.arange(2)), None
    if truth is not None and truth.shape[1] == given.separate.feature_dim:
        expected = given(model(images), torch.arange(2), features=truth.flatten(1))
    if expected is None or not torch.allclose(found, expected, rtol=1e-4):
        return "accepted; timm's features are others", None
    return "right", truth


def _page(outcomes: list[Outcome]) -> str:
    import timm  # noqa: PLC0415

    counts = Counter(outcome.result.split(":")[0].split(";")[0] for outcome in outcomes)
    summary = ", ".join(f"{count} {result}" for result, count in counts.most_common())
    rows = [[*one[:2], f"{one.parameters / 1e6:.2f}", *one[3:]] for one in outcomes]
    header = ["module", "model", "parameters, millions", "head", "result", "negative features"]
    return f"""# Models of timm

`python -m benchmarks heads` puts `SoftmaxSeparateLoss(model.get_classifier())` on the smallest
model of each of timm's modules, with new weights. "Right": the features that the loss finds are
those that timm returns before the classifier. Left out: modules whose smallest model has more than
{MOST_PARAMETERS // 10**6} million parameters. Where no feature is negative, mind
[where to take features](../choosing.md#where-to-take-features).

Of {len(outcomes)}: {summary}.

{table(header, rows)}

timm {timm.__version__}; {provenance(environment())}
"""
