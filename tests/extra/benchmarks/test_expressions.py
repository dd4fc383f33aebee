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
def test_raf_db_as_lists(tmp_path: Path, kind: str) -> None:
    home = raf_db_list(tmp_path / "basic", kind=kind)
    parts = expressions.raf_db(tmp_path)
    for part in parts.values():
        assert shades(part) == {
            name: pytest.approx([10 * (index + 1)], abs=2) for index, name in enumerate(BASIC)
        }
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


ALPHABETICAL = ["anger", "contempt", "disgust", "fear", "happy", "neutral", "sad", "surprise"]


def test_an_alphabetical_copy_of_affectnet_is_refused(tmp_path: Path) -> None:
    for code in range(8):
        for number in range(5 if code == 4 else 1):
            draw(tmp_path / "train" / str(code) / f"{number}.jpg")
    with pytest.raises(ValueError, match="happy in the owners' order, is not the most frequent"):
        expressions.affectnet(tmp_path)
    found = expressions.affectnet(tmp_path, ALPHABETICAL)["train"].counts(BASIC)
    assert found == ONE_EACH | {"happy": 5}
    for number in range(7):
        draw(tmp_path / "train" / "1" / f"{number}.jpg")
    assert expressions.affectnet(tmp_path)["train"].counts(BASIC)["happy"] == 7


@pytest.mark.parametrize("layout", ["folders", "annotations"])
def test_the_numbers_of_a_balanced_copy_of_affectnet_are_asked_about(
    layout: str, tmp_path: Path
) -> None:
    for code in range(8):
        if layout == "folders":
            draw(tmp_path / "train" / str(code) / "a.png", code)
        else:
            annotations = tmp_path / "train_set" / "annotations"
            annotations.mkdir(parents=True, exist_ok=True)
            np.save(annotations / f"{code}_exp.npy", code)
            draw(tmp_path / "train_set" / "images" / f"{code}.png", code)
    own = list(expressions.AFFECTNET[:8])
    with pytest.raises(ValueError, match="Name the folders, or say the order") as refused:
        expressions.affectnet(tmp_path)
    for order in (own, ALPHABETICAL):
        assert " ".join(order) in str(refused.value)
        found = shades(expressions.affectnet(tmp_path, order)["train"])
        assert found == {name: [order.index(name)] for name in BASIC}
    with pytest.raises(ValueError, match="'bored' is none of the classes"):
        expressions.affectnet(tmp_path, ["bored"])


def test_a_balanced_copy_of_affectnet_with_named_folders_is_read(tmp_path: Path) -> None:
    for name in ALPHABETICAL:
        draw(tmp_path / "train" / name / "a.png")
    assert expressions.affectnet(tmp_path)["train"].counts(BASIC) == ONE_EACH


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
        for usage in faces.SPLITS:
            for code in range(7):
                lines.write(f"{code},{' '.join([str(code)] * 2304)},{usage}\n")
    return path


def test_fer_2013_keeps_its_order_of_classes_and_is_mapped_by_name(tmp_path: Path) -> None:
    path = fer_csv(tmp_path / "fer2013.csv")
    names = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
    for index, name in enumerate(names):
        draw(tmp_path / "folders" / name / "a.png", index)
    expected = {BASIC[expressions.index_of(name) or 0]: [i] for i, name in enumerate(names)}
    parts = faces.fer_2013(path)
    assert [*parts] == ["train", "validation", "test"]
    assert all(shades(part) == expected for part in parts.values())
    assert shades(faces.fer_2013(tmp_path / "folders")["test"]) == expected
    path.write_text("emotion,pixel\n")
    with pytest.raises(ValueError, match="lacks pixels, Usage: expected"):
        faces.fer_2013(path)


# Votes of a face, in the order of its authors' columns, and the expected shares; None: left out.
COLUMNS = "neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
VOTES = [
    ("fer0.png", [2, 6, 0, 0, 0, 0, 1, 1, 0, 0], {"neutral": 0.25, "happy": 0.75}),
    ("fer1.png", [0, 0, 0, 4, 0, 0, 4, 0, 2, 0], {"sad": 0.5, "fear": 0.5}),
    ("fer2.png", [0, 0, 3, 0, 0, 0, 0, 3, 3, 1], {"surprise": 1.0}),
    ("fer3.png", [3, 0, 0, 0, 0, 0, 0, 7, 0, 0], None),
    ("fer4.png", [3, 0, 0, 0, 0, 0, 0, 0, 4, 0], None),
    ("fer5.png", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], None),
    ("", [0, 10, 0, 0, 0, 0, 0, 0, 0, 0], None),
]


def ferplus_csv(path: Path) -> Path:
    """The votes beside `fer_csv`, the same for each part."""
    fer_csv(path)
    with path.with_name("fer2013new.csv").open("w", newline="") as lines:
        lines.write(f"Usage,Image name,{COLUMNS}\n")
        for usage in faces.SPLITS:
            for name, votes, _ in VOTES:
                lines.write(f"{usage},{name},{','.join(map(str, votes))}\n")
    return path


def test_ferplus_trains_on_shares_of_votes_and_is_tested_on_the_most_frequent(
    tmp_path: Path,
) -> None:
    path = ferplus_csv(tmp_path / "fer2013.csv")
    parts = faces.ferplus(path)
    expected = [[shares.get(name, 0.0) for name in BASIC] for *_, shares in VOTES if shares]
    torch.testing.assert_close(parts["train"].target, torch.tensor(expected))
    assert shades(parts["test"]) == {"happy": [0], "fear": [1], "surprise": [2]}
    assert not parts["test"].target.is_floating_point()
    votes = path.with_name("fer2013new.csv")
    votes.write_text(votes.read_text().replace("PrivateTest", "PublicTest"))
    with pytest.raises(ValueError, match=r"fer2013new.csv must have the rows of .*: their Usage"):
        faces.ferplus(path)
    votes.unlink()
    with pytest.raises(FileNotFoundError, match=r"fer2013new\.csv"):
        faces.ferplus(path)


def test_identical_pictures_of_two_parts_are_counted(tmp_path: Path) -> None:
    for name, shade in {"a.png": 1, "b.png": 2, "c.png": 2, "d.png": 3}.items():
        draw(tmp_path / "train" / "happy" / name, shade)
    for name, shade in {"e.png": 2, "f.png": 3, "g.png": 4}.items():
        draw(tmp_path / "test" / "sad" / name, shade)  # another name and class
    parts = expressions.folder(tmp_path)
    assert expressions.count_identical(parts["test"], parts["train"]) == 2
    arrays = [np.full((48, 48), shade, np.uint8) for shade in range(5)]
    train, test = (Part(some, torch.zeros(len(some))) for some in (arrays[:3], arrays[2:]))
    assert expressions.count_identical(test, train) == 1
    path = tmp_path / "test" / "sad" / "e.png"  # several faces of one picture
    train, test = (Part([path], torch.zeros(1), [(0, 0, x, 9)]) for x in (8, 9))
    assert expressions.count_identical(train, test) == 0
    assert expressions.count_identical(train, train) == 1


@pytest.mark.parametrize("suffix", sorted(expressions.SUFFIXES))
def test_pictures_of_every_format_are_read(suffix: str, tmp_path: Path) -> None:
    draw(tmp_path / "happy" / f"a{suffix.upper()}", 100)
    assert shades(expressions.folder(tmp_path)["test"]) == {"happy": [pytest.approx(100, abs=2)]}


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
        faces.fer_2013(home)
    path = fer_csv(home / "fer2013.csv")
    with pytest.raises(ValueError, match=rf"is a folder: give the file of FER-2013, {path}$"):
        faces.fer_2013(home)
    with pytest.raises(ValueError, match=r"faces.npz is not FER-2013: expected fer2013\.csv"):
        faces.fer_2013(tmp_path / "faces.npz")
    draw(tmp_path / "flat" / "a.png")
    with pytest.raises(
        ValueError, match=r"not FER-2013: looked for a folder of pictures per class"
    ):
        faces.fer_2013(tmp_path / "flat")
    draw(home / "train" / "happy" / "a.png")
    assert faces.fer_2013(home)["train"].counts(BASIC) == {"happy": 1}
