"""Readers of expression data sets, on folders of a few drawn pictures in every layout."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import expressions, faces
from benchmarks.data.expressions import BASIC, COMPOUND, Part, Pictures

ONE_EACH = dict.fromkeys(BASIC, 1)


def draw(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 16), shade, np.uint8)).save(path)
    return path


def shades(part: Part) -> dict[str, list[int]]:
    """The first pixels of each class: pictures and classes belong together."""
    found: dict[str, list[int]] = {}
    pictures = Pictures(part, 8, mirror=False)
    for picture, label in (pictures[index] for index in range(len(pictures))):
        shade = round(255 * float(picture[0, 0, 0] * 0.229 + 0.485))
        found.setdefault(BASIC[int(label)], []).append(shade)
    return found


def raf_db_list(home: Path, class_names: Sequence[str] = BASIC, kind: str = "aligned") -> Path:
    lines, end = [], "_aligned" if kind == "aligned" else ""
    for side in ("train", "test"):
        for code in range(1, len(class_names) + 1):
            lines.append(f"{side}_{code:05}.jpg {code}")
            draw(home / "Image" / kind / f"{side}_{code:05}{end}.jpg", 10 * code)
    (home / "EmoLabel").mkdir()
    (home / "EmoLabel" / "list_patition_label.txt").write_text("\n".join(lines) + "\n")
    return home


@pytest.mark.parametrize("kind", ["aligned", "original"])
def test_raf_db_as_lists_and_with_votes(tmp_path: Path, kind: str) -> None:
    home = raf_db_list(tmp_path / "basic", kind=kind)
    parts = expressions.raf_db(tmp_path)
    for part in parts.values():
        assert shades(part) == {
            name: pytest.approx([10 * (index + 1)], abs=2) for index, name in enumerate(BASIC)
        }
    rows = [[3.0 if i == j else 1.0 for j in range(7)] for i in range(7)]
    lines = [f"train_{i + 1:05}.jpg {' '.join(map(str, row))}" for i, row in enumerate(rows)]
    (home / "EmoLabel" / "distribution_basic.txt").write_text("\n".join(lines))
    parts = expressions.raf_db(tmp_path, votes=True)
    torch.testing.assert_close(parts["train"].target, torch.tensor(rows) / 9)
    assert not parts["test"].target.is_floating_point()
    (home / "EmoLabel" / "list_patition_label.txt").write_text("train_00001.jpg 8")
    with pytest.raises(ValueError, match=r"line 1: expected .* from 1 to 7, got 'train_00001.jpg"):
        expressions.raf_db(tmp_path)


def test_raf_db_as_folders(tmp_path: Path) -> None:
    for side in ("train", "test"):
        for code in range(1, 8):
            draw(tmp_path / "codes" / side / str(code) / "a.png", code)
        for code, name in enumerate(expressions.AFFECTNET[:7]):
            draw(tmp_path / "affectnet order" / side / f"{code:02}" / "a.png", BASIC.index(name))
    for home, first in (("codes", 1), ("affectnet order", 0)):
        found = shades(expressions.raf_db(tmp_path / home)["test"])
        assert found == {name: [index + first] for index, name in enumerate(BASIC)}
    raf_db_list(tmp_path / "compound", COMPOUND)
    part = expressions.raf_db(tmp_path, COMPOUND)["test"]
    assert part.counts(COMPOUND) == dict.fromkeys(COMPOUND, 1)


def affectnet_csv(home: Path) -> Path:
    lists = home / "Manually_Annotated_file_lists"
    lists.mkdir(parents=True)
    for name in ("training", "validation"):
        with (lists / f"{name}.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            if name == "training":
                writer.writerow(["subDirectory_filePath", "face_x", "face_y", "face_width"])
            for code in range(11):
                path = draw(home / "Manually_Annotated" / str(code) / f"{name}.jpg", 20 * code)
                source = path.relative_to(home / "Manually_Annotated")
                writer.writerow([source, 2, 3, 8, 10, "1;2", code, 0.0, 0.0])
    return home


def test_affectnet_as_csv_and_as_annotations(tmp_path: Path) -> None:
    parts = expressions.affectnet(affectnet_csv(tmp_path / "csv"))
    assert parts["train"].counts(BASIC) == parts["validation"].counts(BASIC) == ONE_EACH
    assert parts["validation"].boxes == [(2, 3, 10, 13)] * 7
    assert shades(parts["validation"])["happy"] == pytest.approx([20], abs=2)
    for side in ("train_set", "val_set"):
        (tmp_path / side / "annotations").mkdir(parents=True)
        for number, code in enumerate([*range(8), 1]):
            draw(tmp_path / side / "images" / f"{number}.jpg")
            value = str(code) if code % 2 else code
            np.save(tmp_path / side / "annotations" / f"{number}_exp.npy", value)
    parts = expressions.affectnet(tmp_path)
    assert parts["train"].counts(BASIC) == ONE_EACH | {"happy": 2}
    np.save(tmp_path / "val_set" / "annotations" / "0_exp.npy", 11)
    with pytest.raises(ValueError, match="holds 11, which is no code from 0 to 10"):
        expressions.affectnet(tmp_path)


def test_an_alphabetical_copy_of_affectnet_is_refused(tmp_path: Path) -> None:
    for code in range(8):
        for number in range(5 if code == 4 else 1):
            draw(tmp_path / "train" / str(code) / f"{number}.jpg")
    with pytest.raises(ValueError, match="seems to number its classes alphabetically"):
        expressions.affectnet(tmp_path)
    for number in range(6):
        draw(tmp_path / "train" / "1" / f"{number}.jpg")
    assert expressions.affectnet(tmp_path)["train"].counts(BASIC)["happy"] == 6


def test_ck_plus_as_sequences_and_as_folders(tmp_path: Path) -> None:
    for code in range(8):
        for frame in range(1, 4):
            draw(tmp_path / "cohn-kanade-images" / f"S{code}" / "001" / f"{frame:08}.png", frame)
        label = tmp_path / "Emotion" / f"S{code}" / "001" / f"S{code}_001_emotion.txt"
        label.parent.mkdir(parents=True)
        label.write_text(f"   {code}.0000000e+00\n")
    found = shades(expressions.ck_plus(tmp_path)["test"])
    assert sorted(found.pop("neutral")) == [1] * 8 + [3]
    assert found == {name: [3] for name in BASIC if name != "neutral"}
    for name in ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise"):
        draw(tmp_path / "other" / "CK+48" / name / "a.png")
    part = expressions.ck_plus(tmp_path / "other")["test"]
    assert part.counts(BASIC) == {name: 1 for name in BASIC if name != "neutral"}


def fer_csv(path: Path) -> Path:
    with path.open("w", newline="") as lines:
        lines.write("emotion, pixels, Usage\n")
        for usage in faces.CSV_SPLITS:
            for code in range(7):
                lines.write(f"{code},{' '.join([str(code)] * 2304)},{usage}\n")
    return path


def test_fer_2013_keeps_its_order_of_classes_and_is_mapped_by_name(tmp_path: Path) -> None:
    path = fer_csv(tmp_path / "fer2013.csv")
    assert faces.load(path).labels.tolist() == [*range(7)] * 3
    assert shades(expressions.fer_2013(path)["train"])["happy"] == [3]
    names = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    images = np.arange(7, dtype=np.uint8)[:, None, None].repeat(48, 1).repeat(48, 2)
    path = tmp_path / "faces.npz"
    np.savez(path, images=images, labels=np.arange(7), split=["train"] * 7, class_names=names)
    for index, name in enumerate(names):
        draw(tmp_path / "folders" / name / "a.png", index)
    expected = {BASIC[expressions.index_of(name) or 0]: [i] for i, name in enumerate(names)}
    assert shades(expressions.fer_2013(path)["train"]) == expected
    assert shades(expressions.fer_2013(tmp_path / "folders")["test"]) == expected
    np.savez(path, images=images)
    with pytest.raises(ValueError, match="lacks class_names, labels, split"):
        faces.load(path)


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not AffectNet: looked for .* it is no folder"):
        expressions.affectnet(tmp_path / "absent")
    draw(tmp_path / "unknown" / "bored" / "a.png")
    with pytest.raises(ValueError, match=r"not RAF-DB .*: looked for EmoLabel/.* it holds bored"):
        expressions.raf_db(tmp_path / "unknown")
    with pytest.raises(ValueError, match="'bored' is none of the classes surprise, fear"):
        expressions.folder(tmp_path / "unknown")
    (tmp_path / "empty" / "happy").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no pictures in its part test"):
        expressions.folder(tmp_path / "empty")
    (tmp_path / "empty" / "happy" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a.png cannot be read as a picture"):
        Pictures(expressions.folder(tmp_path / "empty")["test"], 8, mirror=False)[0]


def test_pictures_without_folders_of_classes_are_told_what_is_needed(tmp_path: Path) -> None:
    """All pictures of a part in one folder, as RAF-DB names them."""
    flat = tmp_path / "flat"
    for side in ("train", "test"):
        draw(flat / side / f"{side}_00001_aligned.jpg")
    named = "a folder of pictures per class, named surprise, fear, disgust, happy, sad, anger"
    for read in (expressions.raf_db, expressions.affectnet, expressions.folder):
        with pytest.raises(ValueError, match=rf"{named}, neutral.*; it holds \w+_00001_align"):
            read(flat)
    with pytest.raises(ValueError, match=r"named .* neutral, or numbered 1 to 7; it holds test_0"):
        expressions.raf_db(flat)
    with pytest.raises(ValueError, match=r"looked for EmoLabel/.*, or train/ and test/ with a fo"):
        expressions.raf_db(flat / "train")
    with pytest.raises(ValueError, match="numbered 1 to 11"):
        expressions.raf_db(flat, COMPOUND)


def test_a_folder_with_the_file_of_fer_2013_is_told_to_give_the_file(tmp_path: Path) -> None:
    home = tmp_path / "archive"
    home.mkdir()
    with pytest.raises(ValueError, match=r"archive is not FER-2013: .* it holds nothing"):
        expressions.fer_2013(home)
    path = fer_csv(home / "fer2013.csv")
    with pytest.raises(ValueError, match=rf"is a folder: give the file of FER-2013, {path}$"):
        expressions.fer_2013(home)
    with pytest.raises(ValueError, match=r"archive is not FER-2013: expected fer2013\.csv"):
        faces.load(home)
    draw(tmp_path / "flat" / "a.png")
    with pytest.raises(
        ValueError, match=r"not FER-2013: looked for a folder of pictures per class"
    ):
        expressions.fer_2013(tmp_path / "flat")
    draw(home / "train" / "happy" / "a.png")
    assert expressions.fer_2013(home)["train"].counts(BASIC) == {"happy": 1}
