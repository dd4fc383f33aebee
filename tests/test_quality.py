"""Does it help? The loaders of faces, the statistics, and the study in small."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]

from benchmarks import faces, mobilenet
from benchmarks.quality import command, data, jobs, runs
from benchmarks.quality.data import DATA, Place
from benchmarks.quality.methods import LADDER, METHODS, STARTS
from benchmarks.quality.runs import FIGURES, Setting, calibration_error, run
from benchmarks.quality.statistics import paired, show_interval, show_spread
from benchmarks.quality.study import (
    FREE,
    PAPER,
    Row,
    Study,
    default_weight,
    judge,
)

NAMES = ["angry", "happy", "sad"]


def some_faces(count: int = 90, seed: int = 0) -> faces.Faces:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(NAMES)
    images = generator.integers(0, 256, (count, 48, 48), np.uint8)
    split = np.where(np.arange(count) < 0.7 * count, "train", "validation")
    return faces.Faces(images, labels, split, NAMES)


def write_npz(found: faces.Faces, folder: Path) -> Path:
    path = folder / "faces.npz"
    np.savez(path, **dict(found._asdict()))
    return path


def write_csv(found: faces.Faces, folder: Path) -> Path:
    path = folder / "fer2013.csv"
    usages = {split: usage for usage, split in faces.CSV_SPLITS.items()}
    with path.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["emotion", "pixels", "Usage"])
        for image, label, split in zip(found.images, found.labels, found.split, strict=True):
            writer.writerow([label, " ".join(map(str, image.ravel())), usages[split]])
    return path


def write_folder(found: faces.Faces, folder: Path) -> Path:
    home = folder / "faces"
    for row, (image, label, split) in enumerate(
        zip(found.images, found.labels, found.split, strict=True)
    ):
        place = home / split / found.class_names[label]
        place.mkdir(parents=True, exist_ok=True)
        # In the order of the images within each class.
        Image.fromarray(image).save(place / f"{row:03}.png")
    return home


def by_class(found: faces.Faces) -> faces.Faces:
    order = np.lexsort((found.labels, found.split))
    return faces.Faces(
        found.images[order], found.labels[order], found.split[order], found.class_names
    )


@pytest.mark.parametrize("write", [write_npz, write_csv, write_folder])
def test_all_forms_of_the_data_load_alike(
    write: Callable[[faces.Faces, Path], Path], tmp_path: Path
) -> None:
    written = by_class(some_faces())
    loaded = faces.load(write(written, tmp_path))
    loaded = by_class(loaded)
    np.testing.assert_array_equal(loaded.images, written.images)
    np.testing.assert_array_equal(loaded.labels, written.labels)
    np.testing.assert_array_equal(loaded.split, written.split)
    expected = list(faces.CSV_CLASSES) if write is write_csv else NAMES
    assert loaded.class_names == expected


def test_a_folder_without_splits_is_divided(tmp_path: Path) -> None:
    home = write_folder(some_faces()._replace(split=np.array(["here"] * 90)), tmp_path)
    loaded = faces.load(home / "here")
    assert (loaded.split == "train").sum() == 72
    assert np.bincount(loaded.labels[loaded.split == "validation"]).tolist() == [6, 6, 6]


def test_missing_data_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["--faces", str(tmp_path / "absent.npz")])
    error = capsys.readouterr().err
    assert "absent.npz is missing" in error
    assert "fer2013.csv" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": np.zeros((1, 48, 48))}, "lacks class_names, labels, split"),
        (some_faces()._replace(images=np.zeros((90, 8, 8), np.uint8))._asdict(), "do not fit"),
        (some_faces()._replace(labels=np.full(90, 3))._asdict(), r"labels in \[0, 3\)"),
    ],
)
def test_other_arrays_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", **content)
    with pytest.raises(ValueError, match=message):
        faces.load(tmp_path / "other.npz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").touch()
    with pytest.raises(ValueError, match="neither a folder"):
        faces.load(tmp_path / "other.txt")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks the columns Usage, emotion, pixels"):
        faces.load(tmp_path / "other.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        faces.load(tmp_path / "empty")


def rows(part: Any) -> set[bytes]:
    return {image.numpy().tobytes() for image in part.images}


@pytest.mark.parametrize("with_test", [False, True])
def test_nothing_is_tuned_on_what_is_reported(with_test: bool) -> None:
    found = some_faces()
    if with_test:
        found.split[-15:] = "test"
    parts = faces.parts(found, most=30)
    sizes = [len(part.labels) for part in (parts.training, parts.tuning, parts.test)]
    assert sizes == ([30, 12, 15] if with_test else [30, 13, 27])
    seen, tuned, reported = rows(parts.training), rows(parts.tuning), rows(parts.test)
    assert len(seen | tuned | reported) == sum(sizes)


@pytest.mark.parametrize("name", ["digits", "few", "text"])
def test_no_sample_is_on_two_sides(name: str) -> None:
    sides = [DATA[name].sides(Place(), 0, tuning) for tuning in (False, True)]
    reported, tuned = (rows(side.measured) for side in sides)
    assert not reported & rows(sides[0].training)
    assert not tuned & rows(sides[1].training)
    assert not reported & tuned
    assert not reported & rows(sides[1].training)


def test_few_digits_are_ten_of_each_drawn_by_the_seed() -> None:
    first, second = (DATA["few"].sides(Place(), seed, False) for seed in (0, 1))
    assert first.training.labels.bincount().tolist() == [10] * 10
    assert not torch.equal(first.training.images, second.training.images)
    assert torch.equal(first.measured.images, second.measured.images)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 7))
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    found = paired(first.tolist(), second.tolist())
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    np.testing.assert_allclose(found.mean, (first - second).mean())


def test_what_cannot_be_known_is_not_shown() -> None:
    assert show_interval(paired([2.0], [1.5]), 2) == "+0.50"
    assert show_interval(paired([2.0, 2.0], [1.0, 1.0]), 1) == "+1.0 [+1.0, +1.0]"
    assert show_spread([None, None], 2) == "-"
    assert show_spread([1.0], 2) == "1.00"
    assert show_spread([1.0, 3.0], 1) == "2.0 ± 1.4"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", data.KINDS)
def test_every_method_trains_and_repeats(
    method: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATA, "faces", DATA["faces"]._replace(classes=lambda _: 3))
    place = Place(write_npz(some_faces(), tmp_path))
    setting = Setting("faces", kind, method, 0.1, 0.01, 0, 2, 16)
    first, second = (run(setting, place) for _ in range(2))
    assert first == second
    found = dict(zip(FIGURES, first, strict=True))
    has_centers = method not in {"softmax", "triplet", "cosface", "norm"}
    of_centers = ("agreement", "agreement_lowest", "nearest")
    missing = {name for name, value in found.items() if value is None}
    assert missing == (set() if has_centers else set(of_centers))


def test_the_pretrained_network_takes_faces_and_its_own_weights_alone(tmp_path: Path) -> None:
    model = mobilenet.FaceClassifier(None, "neck", 7)
    features, logits = model(torch.randn(2, 1, 48, 48))
    assert features.shape == (2, mobilenet.FEATURE_DIM)
    assert logits.shape == (2, 7)
    with pytest.raises(ValueError, match="is no file"):
        mobilenet.check(tmp_path / mobilenet.FILE)
    (tmp_path / mobilenet.FILE).write_bytes(b"other")
    with pytest.raises(ValueError, match=r"starts with b0353104; that of .* starts with d9298a10"):
        mobilenet.check(tmp_path / mobilenet.FILE)


def test_calibration_error_is_that_of_loops() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4).double() * 3, torch.randint(4, (50,))
    confidence, predicted = logits.softmax(-1).max(-1)
    right = predicted == labels
    expected = 0.0
    for place in range(runs.BINS):
        inside = [i for i in range(50) if place <= float(confidence[i]) * runs.BINS < place + 1]
        if inside:
            gap = sum(float(confidence[i]) - float(right[i]) for i in inside) / len(inside)
            expected += len(inside) / 50 * abs(gap)
    assert float(calibration_error(logits, right)) == pytest.approx(expected)


def imagined(name: str, accuracy: Callable[[Setting], float]) -> Study:
    """A study whose trainings are not run: their accuracies are made up."""
    found: dict[str, list[float | None]] = {}

    def measure(wanted: Iterable[Setting]) -> None:
        for one in wanted:
            number = 1 if one.brief else len(FIGURES)
            found[one.key()] = [accuracy(one), *[0.0] * (number - 1)]

    study = Study(name, found, measure)
    study.run()
    return study


def test_ranges_are_extended_while_their_best_is_the_first_or_last() -> None:
    def accuracy(setting: Setting) -> float:
        best = {"center": 0.003, "free": 1.5, "square": 1000.0}.get(setting.method, 0.1)
        away = abs(np.log(max(setting.weight, 1e-9) / best))
        return float(90 - away - 5 * (setting.rate != 0.01))

    study = imagined("few", accuracy)
    assert set(study.rates.values()) == {0.01}
    assert study.weights["signed", "center"] == 0.003
    assert min(study.tried["signed", "center"]) == 0.001
    assert study.weights["signed", "free"] == 1.0
    assert list(study.tried["signed", "free"]) == list(STARTS)
    assert study.weights["signed", "square"] == LADDER[-1]
    tuned = {one for one in study.found if one.endswith("tuning")}
    assert len(tuned) > 100
    reported = {one.seed for one in study.settings("signed", Row("center"))}
    assert not any(f"seed {seed}," in one for seed in reported for one in tuned)
    assert default_weight([study]) == 3.0


def test_the_rule_for_defaults() -> None:
    """By differences beside softmax loss that all seeds share, but for some scatter."""

    def verdict(gain: dict[str, float], fallen: float = 0.0) -> Any:
        def accuracy(setting: Setting) -> float:
            scatter = setting.seed % 3 / 10
            swept = fallen if setting.scale == 100 and setting.method == "free" else 0.0
            return 90 + scatter * (setting.method != "softmax") + gain[setting.method] - swept

        gain = dict.fromkeys(METHODS, 0.0) | {"paper": 1.0, "free": 2.0, "square": 2.0} | gain
        return judge([imagined("digits", accuracy)], FREE[1], PAPER)

    assert verdict({}).holds
    assert verdict({"free": 1.0}).holds
    found = verdict({"free": 0.5})
    assert not found.holds
    assert len(found.worse) == len(data.KINDS)
    found = verdict({"free": -0.2, "paper": -0.3})
    assert not found.holds
    assert not found.better
    found = verdict({}, fallen=5.0)
    assert found.fallen
    assert not found.holds


def small(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The study of these data alone, each in the least number of trainings."""
    for name in set(DATA) - set(names):
        monkeypatch.delitem(DATA, name)
    for name in names:
        little = DATA[name]._replace(
            epochs=1,
            kinds=("signed",),
            rates=(0.01,),
            left_out=tuple(set(METHODS) - {"softmax", "center", "paper", "free", "square"}),
        )
        monkeypatch.setitem(DATA, name, little)


def test_an_interrupted_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(monkeypatch, "digits", "few")
    output = tmp_path / "results"
    arguments = ["--quick", "--workers", "1", "--output", str(output)]
    done = 0

    def interrupted(*given: Any) -> list[float | None]:
        nonlocal done
        done += 1
        if done == 10:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(command, "run", interrupted)
    with pytest.raises(SystemExit, match="Interrupted: the same command goes on"):
        command.main(arguments)
    kept = json.loads((output / "digits.json").read_text())["measured"]
    assert len(kept) == 9
    command.main(arguments)
    digits, few = (
        json.loads((output / f"{name}.json").read_text())["measured"] for name in ("digits", "few")
    )
    assert {name: digits[name] for name in kept} == kept
    assert done - 1 == len(digits) + len(few)
    capsys.readouterr()

    command.main([*arguments, "--redraw"])
    shown = capsys.readouterr().out
    assert "runs to do" not in shown
    text = (output / "tables.md").read_text()
    assert text in shown
    for expected in ("## In short", "Fixed before the runs", "### few, signed", "batches of 256"):
        assert expected in text


def test_data_that_nobody_brought_are_left_out_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class StartedError(Exception):
        pass

    def stopped(name: str, *_: Any, **__: Any) -> None:
        raise StartedError(name)

    monkeypatch.setattr(command, "Study", stopped)
    with pytest.raises(StartedError, match="digits"):
        command.main(["--output", str(tmp_path), "--workers", "1"])
    assert "Without --faces, FER-2013" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--output", str(tmp_path), "--data", "pretrained"])
    assert "--data pretrained needs --faces" in capsys.readouterr().err


def test_jobs_say_what_is_missing_when_nothing_may_run(tmp_path: Path) -> None:
    class Redrawn:
        measured: dict[str, Any] = {}  # noqa: RUF012
        redraw, path = True, tmp_path

    with pytest.raises(SystemExit, match="has no figures for one"):
        jobs.execute({"one": lambda: [1.0]}, Redrawn())  # type: ignore[arg-type]
