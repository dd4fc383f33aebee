"""Readers of expression data sets, on folders of a few drawn pictures in every layout."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import expressions
from benchmarks.expressions import BASIC, COMPOUND, Pictures, counts

ONE_EACH = dict.fromkeys(BASIC, 1)


def draw(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 16), shade, np.uint8)).save(path)
    return path


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture))


def shades(part: expressions.Part) -> dict[str, list[int]]:
    """Of each class, by the first pixel: pictures and classes belong together."""
    found: dict[str, list[int]] = {}
    pictures = Pictures(part, to_tensor)
    for picture, label in (pictures[place] for place in range(len(pictures))):
        found.setdefault(BASIC[int(label)], []).append(int(picture[0, 0, 0]))
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
def test_raf_db_as_lists(tmp_path: Path, kind: str) -> None:
    parts = expressions.raf_db(raf_db_list(tmp_path / "basic", kind=kind).parent)
    assert set(parts) == {"train", "test"}
    for part in parts.values():
        assert counts(part) == ONE_EACH
        for place, name in enumerate(BASIC):
            assert shades(part)[name] == pytest.approx([10 * (place + 1)], abs=2)


def test_raf_db_compound(tmp_path: Path) -> None:
    parts = expressions.raf_db_compound(raf_db_list(tmp_path / "compound", COMPOUND).parent)
    assert counts(parts["test"], COMPOUND) == dict.fromkeys(COMPOUND, 1)


def test_raf_db_with_votes(tmp_path: Path) -> None:
    raf_db_list(tmp_path)
    path = tmp_path / "EmoLabel" / "distribution_basic.txt"
    with pytest.raises(ValueError, match="shares of votes are read from there"):
        expressions.raf_db(tmp_path, votes=True)
    rows = [[3.0 if i == j else 1.0 for j in range(7)] for i in range(7)]
    lines = [f"train_{i + 1:05}.jpg {' '.join(map(str, row))}" for i, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    parts = expressions.raf_db(tmp_path, votes=True)
    torch.testing.assert_close(parts["train"].target, torch.tensor(rows) / 9)
    assert not parts["test"].target.is_floating_point()
    path.write_text("\n".join(lines[:3]))
    with pytest.raises(ValueError, match="no seven shares for train_00004"):
        expressions.raf_db(tmp_path, votes=True)


def test_raf_db_as_folders(tmp_path: Path) -> None:
    for side in ("train", "test"):
        for code in range(1, 8):
            draw(tmp_path / "codes" / side / str(code) / "a.png", code)
        for code, name in enumerate(expressions.AFFECTNET[:7]):
            draw(tmp_path / "affectnet order" / side / f"{code:02}" / "a.png", BASIC.index(name))
    for name in BASIC:
        for side in ("train", "valid"):
            draw(tmp_path / "names" / side / name.capitalize() / "a.png")
    for home, first in (("codes", 1), ("affectnet order", 0)):
        found = shades(expressions.raf_db(tmp_path / home)["test"])
        assert found == {name: [place + first] for place, name in enumerate(BASIC)}
    parts = expressions.raf_db(tmp_path / "names")
    assert counts(parts["validation"]) == ONE_EACH


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_00001.jpg 8", r"line 1: expected .* a code from 1 to 7, got 'train_00001.jpg 8'"),
        ("valid_00001.jpg 3", "expected train_N.jpg or test_N.jpg"),
        ("train_00099.jpg 3", "train_00099_aligned.jpg is missing, which .* line 1, names"),
    ],
)
def test_wrong_lines_are_refused(tmp_path: Path, line: str, message: str) -> None:
    raf_db_list(tmp_path)
    (tmp_path / "EmoLabel" / "list_patition_label.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        expressions.raf_db(tmp_path)


def affectnet_csv(home: Path, header: bool = True) -> Path:
    lists = home / "Manually_Annotated_file_lists"
    lists.mkdir(parents=True)
    for name in ("training", "validation"):
        with (lists / f"{name}.csv").open("w", newline="") as lines:
            writer = csv.writer(lines)
            if header or name == "training":
                writer.writerow(["subDirectory_filePath", "face_x", "face_y", "face_width",
                                 "face_height", "facial_landmarks", "expression", "valence",
                                 "arousal"])  # fmt: skip
            for code in range(11):
                path = draw(home / "Manually_Annotated" / str(code) / f"{name}.jpg", 20 * code)
                place = path.relative_to(home / "Manually_Annotated")
                writer.writerow([place, 2, 3, 8, 10, "1;2", code, 0.0, 0.0])
    return home


@pytest.mark.parametrize("header", [True, False])
def test_affectnet_as_csv_is_cropped_to_its_boxes(tmp_path: Path, header: bool) -> None:
    parts = expressions.affectnet(affectnet_csv(tmp_path, header))
    assert counts(parts["train"]) == counts(parts["validation"]) == ONE_EACH
    picture, label = Pictures(parts["validation"], to_tensor)[1]
    assert picture.shape == (10, 8, 3)
    assert BASIC[int(label)] == "happy"
    assert int(picture[0, 0, 0]) == pytest.approx(20, abs=2)


@pytest.mark.parametrize("validation", ["val_set", "valid_set"])
def test_affectnet_as_annotations(tmp_path: Path, validation: str) -> None:
    for side in ("train_set", validation):
        (tmp_path / side / "annotations").mkdir(parents=True)
        for number, code in enumerate([*range(8), 1]):
            draw(tmp_path / side / "images" / f"{number}.jpg")
            value = str(code) if code % 2 else code
            np.save(tmp_path / side / "annotations" / f"{number}_exp.npy", value)
    parts = expressions.affectnet(tmp_path)
    assert counts(parts["train"]) == counts(parts["validation"]) == ONE_EACH | {"happy": 2}
    (tmp_path / validation / "annotations" / "0_exp.npy").unlink()
    with pytest.raises(ValueError, match=r"0_exp.npy is missing, beside .*0.jpg"):
        expressions.affectnet(tmp_path)
    np.save(tmp_path / validation / "annotations" / "0_exp.npy", 11)
    with pytest.raises(ValueError, match="holds 11, which is no code from 0 to 10"):
        expressions.affectnet(tmp_path)


def test_an_alphabetical_copy_of_affectnet_is_refused(tmp_path: Path) -> None:
    for side in ("train", "val"):
        for code in range(8):
            for number in range(5 if code == 4 else 1):
                draw(tmp_path / side / str(code) / f"{number}.jpg")
    with pytest.raises(ValueError, match="seems to number its classes alphabetically"):
        expressions.affectnet(tmp_path)
    for number in range(6):
        draw(tmp_path / "train" / "1" / f"{number}.jpg")
    assert counts(expressions.affectnet(tmp_path)["train"])["happy"] == 6


def test_ck_plus_as_sequences(tmp_path: Path) -> None:
    for code in range(8):
        for frame in range(1, 4):
            draw(tmp_path / "cohn-kanade-images" / f"S{code}" / "001" / f"{frame:08}.png", frame)
        label = tmp_path / "Emotion" / f"S{code}" / "001" / f"S{code}_001_emotion.txt"
        label.parent.mkdir(parents=True)
        label.write_text(f"   {code}.0000000e+00\n")
    found = shades(expressions.ck_plus(tmp_path)["test"])
    assert sorted(found.pop("neutral")) == [1] * 8 + [3]
    assert found == {name: [3] for name in BASIC if name != "neutral"}


def test_ck_plus_as_folders(tmp_path: Path) -> None:
    for name in ("anger", "contempt", "disgust", "fear", "happy", "sadness", "surprise"):
        draw(tmp_path / "CK+48" / name / "a.png")
    part = expressions.ck_plus(tmp_path)["test"]
    assert counts(part) == {name: 1 for name in BASIC if name != "neutral"}


def fer_csv(path: Path, spaces: str = "") -> Path:
    with path.open("w", newline="") as lines:
        lines.write(f"emotion,{spaces}pixels,{spaces}Usage\n")
        for usage in expressions.FER_SPLITS:
            for code in range(7):
                lines.write(f"{code},{' '.join(['7'] * 2304)},{usage}\n")
    return path


@pytest.mark.parametrize("spaces", ["", " "])
def test_fer_2013_as_csv(tmp_path: Path, spaces: str) -> None:
    parts = expressions.fer_2013(fer_csv(tmp_path / "fer2013.csv", spaces))
    assert set(parts) == {"train", "validation", "test"}
    assert counts(parts["test"]) == ONE_EACH
    assert shades(parts["train"])["happy"] == [7]


def test_fer_plus_votes_follow_its_rule(tmp_path: Path) -> None:
    path = fer_csv(tmp_path / "fer2013.csv")
    rows = [["Training", f"fer{i:07}.png", *["0"] * 10] for i in range(21)]
    for row in rows:
        row[3] = "10"  # happy
    rows[0][2:6] = ["6", "3", "1", "0"]  # neutral 6, happy 3, a single vote for surprise
    rows[1][2:12] = ["0"] * 8 + ["7", "3"]  # unknown
    rows[2][1] = ""  # no face
    with (tmp_path / "fer2013new.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([["Usage", "Image name", *expressions.FER_PLUS], *rows])
    part = expressions.fer_2013(path, votes=True)["train"]
    assert len(part.target) == 5
    expected = torch.zeros(7)
    expected[BASIC.index("neutral")], expected[BASIC.index("happy")] = 6 / 9, 3 / 9
    torch.testing.assert_close(part.target[0], expected)
    (tmp_path / "fer2013new.csv").write_text("header\n")
    with pytest.raises(ValueError, match="a line for each of 21 faces, got 0"):
        expressions.fer_2013(path, votes=True)


def test_arrays_and_folders_are_mapped_by_name(tmp_path: Path) -> None:
    names = ["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"]
    images = np.arange(7, dtype=np.uint8)[:, None, None].repeat(48, 1).repeat(48, 2)
    path = tmp_path / "faces.npz"
    np.savez(path, images=images, labels=np.arange(7), split=["train"] * 7, class_names=names)
    for place, name in enumerate(names):
        draw(tmp_path / "MMI" / name / "a.png", place)
    expected = {BASIC[expressions.index_of(name) or 0]: [i] for i, name in enumerate(names)}
    assert shades(expressions.fer_2013(path)["train"]) == expected
    assert shades(expressions.folder(tmp_path / "MMI")["test"]) == expected


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    draw(tmp_path / "other" / "a.png")
    with pytest.raises(
        ValueError, match=r"not RAF-DB .*: looked for EmoLabel/list.* it holds a.png"
    ):
        expressions.raf_db(tmp_path / "other")
    with pytest.raises(ValueError, match=r"not AffectNet: looked for .* it is no folder"):
        expressions.affectnet(tmp_path / "absent")
    draw(tmp_path / "unknown" / "bored" / "a.png")
    with pytest.raises(ValueError, match="'bored' is none of the classes surprise, fear"):
        expressions.folder(tmp_path / "unknown")
    (tmp_path / "empty" / "happy").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no pictures in its part test"):
        expressions.folder(tmp_path / "empty")
    (tmp_path / "broken" / "happy").mkdir(parents=True)
    (tmp_path / "broken" / "happy" / "a.png").write_text("no picture")
    pictures = Pictures(expressions.folder(tmp_path / "broken")["test"], to_tensor)
    with pytest.raises(ValueError, match=r"a.png cannot be read as a picture"):
        pictures[0]
    with pytest.raises(ValueError, match="expected a csv, an npz or a folder"):
        expressions.fer_2013(tmp_path / "absent.csv")
