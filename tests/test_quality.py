"""Does it help? The loaders of faces, the statistics, and the whole comparison in small."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]

from benchmarks import faces
from benchmarks.quality import command, pictures, runs
from benchmarks.quality.bar import judge
from benchmarks.quality.methods import METHODS
from benchmarks.quality.settings import FULL, KINDS, QUICK, Scale, Setting
from benchmarks.quality.statistics import paired, show_interval, show_spread

NAMES = ["angry", "happy", "sad"]
ONE_OF_EACH = Scale(
    faces=30,
    epochs={"digits": 1, "faces": 1},
    seeds={"digits": 2, "faces": 2},
    tuning_seeds={"digits": 1, "faces": 1},
    sweep_seeds={"digits": 1, "faces": 1},
    batch_seeds=1,
    weights=(0.9,),
    feature_dims=(128,),
    batch_sizes=(20,),
)


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
        command.main(["--data", str(tmp_path / "absent.npz")])
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


def test_digits_are_trained_on_ten_of_each_and_tested_on_others() -> None:
    source = runs.Source(None, 0)
    first, second = (runs.parts("digits", source, seed) for seed in (0, 1))
    assert first.training.labels.bincount().tolist() == [10] * 10
    assert not torch.equal(first.training.images, second.training.images)
    assert torch.equal(first.test.images, second.test.images)
    assert not rows(first.test) & (rows(first.training) | rows(first.tuning))


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


def test_the_bar_is_met_by_what_is_better_and_by_nothing_else() -> None:
    softmax = [{"intra": 0.5, "inter": 0.5, "accuracy": 50.0 + run} for run in range(3)]
    better = [
        {"intra": 0.6, "inter": 0.4, "agreement": 0.9, "accuracy": 50.5 + run} for run in range(3)
    ]
    worse = [
        {"intra": 0.4, "inter": 0.6, "agreement": 0.7, "accuracy": 49.0 + run} for run in range(3)
    ]
    assert [met for _, met in judge(better, softmax)] == [True] * 4
    assert [met for _, met in judge(worse, softmax)] == [False] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_and_repeats(method: str, kind: Any, tmp_path: Path) -> None:
    source = runs.Source(write_npz(some_faces(), tmp_path), 30)
    setting = Setting("faces", kind, method, 0.1, 0.01, 2, 10, 16, seed=0)
    first, second = (runs.record(setting, source, True) for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second
    assert sum(map(sum, first["confusion"])) == 27
    assert first["course"]["epoch"] == [1, 2]
    has_centers = method not in {"softmax", "triplet", "cosface"}
    assert (first["agreement"] is not None) == has_centers
    assert -1 <= first["inter"] <= 1


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "QUICK", ONE_OF_EACH)
    monkeypatch.setattr(pictures, "SAMPLES", 60)
    path, output = write_npz(some_faces(150), tmp_path), tmp_path / "results"
    arguments = ["--quick", "--workers", "1", "--data", str(path), "--output", str(output)]
    done = 0
    measure = runs.record

    def interrupted(*given: Any) -> dict[str, Any]:
        nonlocal done
        done += 1
        if done == 10:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(runs, "record", interrupted)
    with pytest.raises(SystemExit, match="Interrupted: the same command goes on"):
        command.main(arguments)
    kept = json.loads((output / "results.json").read_text())["measured"]
    assert len(kept) == 9
    command.main(arguments)
    whole = json.loads((output / "results.json").read_text())["measured"]
    assert {name: whole[name] for name in kept} == kept
    assert done - 1 == sum("seconds" in one for one in whole.values())
    capsys.readouterr()

    command.main(arguments)
    shown = capsys.readouterr().out
    assert "runs to do" not in shown
    text = (output / "tables.md").read_text()
    assert text in shown
    for expected in ("FER-2013, signed features", "**met**", "Beside the paper", "margin 0.1"):
        assert expected in text
    for name in ("features-faces-signed", "agreement-faces", "weight-digits", "size-faces"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "confusion-faces.png").exists()


def test_without_faces_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Scale, data: tuple[str, ...], *__: Any) -> None:
        sys.exit(f"to run: {data}")

    monkeypatch.setattr(command, "Study", stopped)
    with pytest.raises(SystemExit, match=r"^to run: \('digits',\)$"):
        command.main(["--output", str(tmp_path)])
    assert "only scikit-learn's digits are run" in capsys.readouterr().out


def test_quick_has_fewer_of_everything() -> None:
    assert QUICK.faces < FULL.faces
    assert QUICK.seeds["faces"] < FULL.seeds["faces"]
    assert FULL.seeds["faces"] >= 5
