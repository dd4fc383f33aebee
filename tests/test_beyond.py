"""Separations that were tried in place of Eq. 3: against loops, at their minima, and in small."""

import json
import math
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from benchmarks.beyond import command, stdlib
from benchmarks.beyond.data import DataName, Source, load
from benchmarks.beyond.figures import auroc, calibration_error, closest
from benchmarks.beyond.losses import SEPARATIONS, TEMPERATURE, Candidate
from benchmarks.beyond.methods import PEERS, additions, name_of
from benchmarks.beyond.runs import Setting
from benchmarks.beyond.study import Record, Scale, Study
from separate_loss import SeparateLoss
from tests import reference

Array = NDArray[np.float64]
SIZES = {"few classes": (9, 4, 6), "more classes than features": (12, 7, 3), "two": (5, 2, 4)}
OF_SAMPLES = ("samples", "square of samples", "soft maximum")


def over_pairs(centers: Array, of: str) -> float:
    """Means over ordered pairs of different centers."""
    count, total = len(centers), 0.0
    for k in range(count):
        for j in range(count):
            if j != k:
                cosine = reference.cosine(centers[k], centers[j])
                total += summand(cosine, count) if "square" in of else (cosine + 1) / 2
    return total / (count * (count - 1))


def summand(cosine: float, count: int) -> float:
    return ((cosine + 1 / (count - 1)) / (1 + 1 / (count - 1))) ** 2


def over_samples(
    features: Array, target: list[int], centers: Array, of: str, shares: Array
) -> float:
    """Means over samples, of means over the other classes' centers."""
    count, total = len(centers), 0.0
    for i, label in enumerate(target):
        mean = 0.0
        for j in range(count):
            if j != label:
                cosine = reference.cosine(features[i], centers[j])
                if of == "samples":
                    mean += (cosine + 1) / 2 / (count - 1)
                elif of == "square of samples":
                    mean += summand(cosine, count) / (count - 1)
                else:
                    mean += math.exp(cosine / TEMPERATURE) / (count - 1)
        total += shares[i] * ((1 + TEMPERATURE * math.log(mean)) / 2 if "soft" in of else mean)
    return total


def oracle(features: Array, target: list[int], centers: Array, of: str, shares: Array) -> float:
    if of in OF_SAMPLES:
        return over_samples(features, target, centers, of, shares)
    if of == "samples and centers":
        both = over_samples(features, target, centers, "samples", shares)
        return (both + over_pairs(centers, "centers")) / 2
    return over_pairs(centers, of)


def problem(samples: int, classes: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, target, centers, class weights."""
    torch.manual_seed(0)
    features = torch.randn(samples, dim, dtype=torch.float64, requires_grad=True)
    centers = torch.randn(classes, dim, dtype=torch.float64, requires_grad=True)
    return features, torch.randint(classes, (samples,)), centers, torch.rand(classes).double() + 0.5


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize(("separation", "weighted"), list(product(SEPARATIONS, (False, True))))
def test_candidates_are_what_the_loops_say(
    separation: str, weighted: bool, size: tuple[int, int, int]
) -> None:
    features, target, centers, weight = problem(*size)
    candidate = Candidate(separation, centers.detach(), weight=weight if weighted else None)
    candidate.double()
    mass = weight[target].numpy() if weighted else np.ones(len(target))
    shares = mass / mass.sum()
    samples, means, labels = features.detach().numpy(), centers.detach().numpy(), target.tolist()
    expected = oracle(samples, labels, means, separation, shares)
    for i, label in enumerate(labels):
        expected += shares[i] * (1 - reference.similarity(samples[i], means[label]))
    assert candidate(features, target).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("separation", SEPARATIONS)
def test_gradients(separation: str, size: tuple[int, int, int]) -> None:
    features, target, centers, weight = problem(*size)
    shares = weight[target] / weight[target].sum()

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        units, directions = F.normalize(features, dim=-1), F.normalize(centers, dim=-1)
        value = SEPARATIONS[separation](units, target, directions, shares)
        return value + 0 * features.sum()

    assert gradcheck(loss, (features, centers))
    assert gradgradcheck(loss, (features, centers))


@pytest.mark.parametrize("separation", SEPARATIONS)
def test_bounds(separation: str) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        features, target = F.normalize(torch.randn(20, 5), dim=-1), torch.randint(6, (20,))
        centers = F.normalize(torch.randn(6, 5), dim=-1)
        if seed == 0:
            features = centers = F.normalize(torch.ones(6, 5), dim=-1)
            target = torch.arange(6)
        shares = torch.full((len(target),), 1 / len(target))
        assert -1e-6 <= SEPARATIONS[separation](features, target, centers, shares) <= 1 + 1e-6


def test_eq_3_as_a_candidate_is_the_separate_loss() -> None:
    features, target, centers, _ = problem(9, 4, 6)
    centers = centers.detach()
    ours = SeparateLoss(4, 6, center_update="gradient", center_init=centers, dtype=torch.float64)
    candidate = Candidate("centers", centers.clone()).double()
    found = []
    for one in (ours, candidate):
        loss = one(features, target)
        found.append((loss, *torch.autograd.grad(loss, (features, one.centers))))
    torch.testing.assert_close(*found)


def simplex(classes: int, dim: int) -> Tensor:
    """Directions with cosine -1 / (classes - 1) to one another, turned at random."""
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    return F.normalize(F.pad(corners, (0, dim - classes)) @ basis, dim=-1)


def two_on_one_direction() -> Tensor:
    """Four classes, of which each shares its direction with another; they sum to zero."""
    along = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
    return along * F.normalize(torch.ones(1, 5, dtype=torch.float64), dim=-1)


def separation(name: str, directions: Tensor) -> float:
    """Of samples that point as the centers of their classes do."""
    target = torch.arange(len(directions))
    shares = torch.full_like(directions[:, 0], 1 / len(directions))
    return SEPARATIONS[name](directions, target, directions, shares).item()


@pytest.mark.parametrize("name", SEPARATIONS)
def test_which_separations_see_two_classes_on_one_direction(name: str) -> None:
    apart, together = (separation(name, of) for of in (simplex(4, 5), two_on_one_direction()))
    if name in {"square of centers", "square of samples", "soft maximum"}:
        assert together > apart + 0.1
    else:
        assert together == pytest.approx(apart)


@pytest.mark.parametrize("name", ["square of centers", "square of samples"])
def test_the_square_is_zero_at_the_simplex_and_nowhere_else(name: str) -> None:
    least = simplex(4, 5)
    assert separation(name, least) == pytest.approx(0, abs=1e-12)
    torch.manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        moved = F.normalize(least + size * torch.randn_like(least), dim=-1)
        cosines = (moved @ moved.T)[~torch.eye(4, dtype=torch.bool)]
        farthest = (cosines + 1 / 3).square().mean() / (4 / 3) ** 2
        assert separation(name, moved) == pytest.approx(farthest.item())
        assert separation(name, moved) > 1e-6


@pytest.mark.parametrize(("classes", "dim"), [(5, 3), (8, 4), (12, 2)])
def test_the_squares_bound_where_the_simplex_does_not_fit(classes: int, dim: int) -> None:
    """docs/beyond.md: reached by tight frames that sum to zero, as polygons are."""
    bound = (classes - 1 - dim) / (classes * dim)
    torch.manual_seed(0)
    for _ in range(20):
        directions = F.normalize(torch.randn(classes, dim, dtype=torch.float64), dim=-1)
        assert separation("square of centers", directions) >= bound
    if dim == 2:
        angles = torch.arange(classes).double() * 2 * torch.pi / classes
        polygon = torch.stack([angles.cos(), angles.sin()], -1)
        assert separation("square of centers", polygon) == pytest.approx(bound)


def test_descent_leaves_a_shared_direction_under_the_square_alone() -> None:
    cosines = {}
    for name in ("centers", "square of centers"):
        torch.manual_seed(0)
        start = two_on_one_direction() + 1e-3 * torch.randn(4, 5, dtype=torch.float64)
        directions = start.requires_grad_()
        none = torch.zeros(0, dtype=torch.float64)
        for _ in range(500):
            loss = SEPARATIONS[name](none, none.long(), F.normalize(directions, dim=-1), none)
            (gradient,) = torch.autograd.grad(loss, directions)
            directions = (directions - gradient).detach().requires_grad_()
        cosines[name] = closest(directions.detach())
    assert cosines["centers"] > 0.99
    assert cosines["square of centers"] == pytest.approx(-1 / 3, abs=1e-3)


def test_features_feel_samples_and_not_eq_3() -> None:
    features, target, centers, _ = problem(9, 4, 6)
    norms = {}
    for name in SEPARATIONS:
        units, directions = F.normalize(features, dim=-1), F.normalize(centers, dim=-1)
        shares = torch.full((9,), 1 / 9, dtype=torch.float64)
        value = SEPARATIONS[name](units, target, directions, shares) + 0 * features.sum()
        norms[name] = torch.autograd.grad(value, features)[0].norm(dim=-1)
    for name, norm in norms.items():
        assert bool((norm > 0).all()) != name.endswith("centers") or name == "samples and centers"


def test_centers_at_rest_under_samples_are_class_means_against_the_others() -> None:
    """docs/beyond.md: with balanced classes, and with what the loss then is."""
    features, target = problem(12, 4, 6)[0].detach(), torch.arange(12) % 4
    units = F.normalize(features, dim=-1)
    means = torch.stack([units[target == j].mean(0) for j in range(4)])
    against = means - (means.sum(0) - means) / 3
    candidate = Candidate("samples", against.clone()).double()
    loss = candidate(features, target)
    (gradient,) = torch.autograd.grad(loss, candidate.centers)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert loss.item() == pytest.approx(1 - against.norm(dim=-1).mean().item() / 2)


def test_centring_follows_the_mean_and_takes_it_off() -> None:
    features, target, centers, _ = problem(9, 4, 6)
    candidate = Candidate("samples", centers.detach(), centred=True).double()
    plain = Candidate("samples", centers.detach()).double()
    first = features.mean(0)
    expected = plain(features - first, target)
    torch.testing.assert_close(candidate(features, target), expected)
    candidate(features + 1, target)
    torch.testing.assert_close(candidate.mean, (first + 0.1).detach())
    candidate.eval()
    candidate(features + 100, target)
    torch.testing.assert_close(candidate.mean, (first + 0.1).detach())


def test_calibration_error_is_what_the_loops_say() -> None:
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(200, 4), torch.randint(4, (200,))
    shares = logits.double().softmax(-1).numpy()
    expected = 0.0
    for low, high in pairwise(np.linspace(0, 1, 16)):
        gaps = [
            row.max() - float(row.argmax() == label)
            for row, label in zip(shares, labels.tolist(), strict=True)
            if low < row.max() <= high
        ]
        expected += abs(sum(gaps)) / 200
    assert calibration_error(logits, labels) == pytest.approx(expected)
    sure = 100 * F.one_hot(labels, 4).float()
    assert calibration_error(sure, labels) == pytest.approx(0, abs=1e-9)
    assert calibration_error(sure, (labels + 1) % 4) == pytest.approx(1)


def test_unknown_samples_are_told_by_their_distance() -> None:
    means = torch.eye(3, dtype=torch.float64)
    known, strange = 5 * torch.eye(3) + 0.1, torch.ones(2, 3)
    assert auroc(known, strange, means) == 1
    assert auroc(strange, known, means) == 0
    assert auroc(known, known, means) == 0.5


def rows(inputs: Tensor) -> set[bytes]:
    return {one.numpy().tobytes() for one in inputs}


def test_nothing_is_tuned_on_what_is_reported_or_trained_on_what_is_unknown() -> None:
    for name in ("digits", "stdlib"):
        data = load(name, Source(None, 0), 0)
        parts = [rows(part.images) for part in data[:3]]
        parts += [rows(inputs) for inputs in data.unknown.values()]
        # A license's text stands in several files.
        most = 0 if name == "digits" else 5
        assert all(len(one & other) <= most for one, other in pairwise([*parts, parts[0]]))
        for part in data[:3]:
            assert (part.labels.bincount(minlength=len(data.class_names)) > 0).all()


def test_chunks_are_of_whole_files_and_of_no_tests(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "inner.py").write_text("x = 1\n" * 100)
    lines = [f"line = {number}" for number in range(45)]
    (tmp_path / "some.py").write_text("\n\n".join(lines))
    (only,) = stdlib.files(tmp_path)
    assert list(stdlib.chunks(only)) == ["\n".join(lines[:20]), "\n".join(lines[20:40])]


def study_of(figures: dict[str, dict[str, float]]) -> Study:
    """Figures of methods, on three data sets, with a spread of a tenth over five seeds."""

    def measure(settings: object) -> dict[Setting, Record]:
        assert isinstance(settings, list)
        return {
            one: {
                name: value + 0.1 * math.sin(one.seed * 7 + len(one.method))
                for name, value in (DULL | figures.get(one.method, {})).items()
            }
            for one in settings
        }

    every: tuple[DataName, ...] = ("digits", "stdlib", "faces")
    ones: dict[DataName, int] = dict.fromkeys(every, 1)
    scale = Scale(0, ones, dict.fromkeys(every, 5), ones)
    study = Study(scale, every, ("signed",), measure)
    study.run()
    return study


DULL = {"accuracy": 50.0, "auroc some": 80.0, "ece": 5.0}


def test_only_what_is_clearly_better_wins() -> None:
    better, bought = {"accuracy": 53.0}, {"accuracy": 53.0, "ece": 9.0}
    study = study_of({"samples": better, "soft maximum": bought, "square of samples": {"ece": 2.0}})
    winners = [name for name in study.candidates("signed") if study.wins("signed", name)]
    assert winners == ["samples"]
    assert study.best["signed"] in {"samples", "soft maximum"}
    assert study.clearly("faces", "signed", "soft maximum", "softmax", "ece") == -1
    assert study.clearly("faces", "signed", "square of samples", "separate", "ece") == 1
    assert study.nearest("signed") == "samples"
    assert not study.wins("signed", name_of("centers", centred=True))


def test_the_whole_study_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ones: dict[DataName, int] = {"digits": 1}
    monkeypatch.setattr(command, "QUICK", Scale(30, ones, {"digits": 2}, ones))
    arguments = ["--quick", "--only", "digits", "--features", "signed", "--workers", "1"]
    arguments += ["--output", str(tmp_path)]
    command.main(arguments)
    assert "FER-2013 is not run" in capsys.readouterr().out
    whole = json.loads((tmp_path / "results.json").read_text())["measured"]
    methods = {name.split("/")[2] for name in whole}
    assert set(PEERS) <= methods
    command.main(arguments)
    shown = capsys.readouterr().out
    assert "runs to do" not in shown
    text = (tmp_path / "tables.md").read_text()
    assert text in shown
    head, *runs = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert {name: whole[name]["accuracy"] for name in whole} == {run[0]: run[1] for run in runs}
    assert {len(run) - 1 for run in runs} == {len(names) for names in head["figures"].values()}
    for expected in ("Who wins, signed features", "centred AUROC, digit 9", "CosFace head"):
        assert expected in text
    assert any(set(additions(best)) <= methods for best in SEPARATIONS)
