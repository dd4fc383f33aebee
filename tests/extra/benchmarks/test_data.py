"""Readers of the study's data."""

import csv
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import cifar10, drawn, fingerprint, intents
from examples import intents as example


def some_intents(path: Path, classes: int) -> Path:
    """Sentences that differ, 55, 4 and 3 of each intent."""
    parts = {
        name: [
            [f"{name} {i} of {label}", f"intent {label:03}"]
            for label in range(classes)
            for i in range(n)
        ]
        for name, n in (("train", 55), ("val", 4), ("test", 3))
    }
    path.write_text(json.dumps({**parts, "oos_test": [["no intent", "oos"]]}))
    return path


def some_pictures(path: Path) -> Path:
    """Pictures of noise, 700 and 2 of each class."""
    labels = np.arange(7020) % 10
    noise = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 4, 3), np.uint8)
    files = []
    for picture in noise:
        buffer = io.BytesIO()
        Image.fromarray(picture).resize((32, 32)).save(buffer, "jpeg")
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    offsets = np.cumsum([0, *(len(file) for file in files)])
    test = np.arange(len(labels)) >= 7000
    np.savez(path, bytes=np.concatenate(files), offsets=offsets, labels=labels, test=test)
    return path


def test_intents_of_a_json_file_and_of_csv_files_are_equal(tmp_path: Path) -> None:
    found = intents.load(some_intents(tmp_path / "one.json", 5))
    assert {name: len(part.labels) for name, part in found.items()} == {
        "train": 275,
        "valid": 20,
        "test": 15,
    }
    rows = json.loads((tmp_path / "one.json").read_text())
    (tmp_path / "two").mkdir()
    for name in ("train", "test"):
        with (tmp_path / "two" / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "category"], *rows[name]])
    other = intents.load(tmp_path / "two")
    assert other["test"].images.equal(found["test"].images)
    assert [len(other[name].labels) for name in ("train", "valid")] == [175, 100]
    both = {row.numpy().tobytes() for name in ("train", "valid") for row in other[name].images}
    assert both == {row.numpy().tobytes() for row in found["train"].images}


def test_sentences_become_words_and_pairs() -> None:
    one, two, three = intents.encoded(["My CARD, please!", "my card", "card my"])
    assert (one > 0).sum() == 5
    assert (two > 0).sum() == 3
    assert set(two.tolist()) < set(one.tolist())
    assert set(two.tolist()) & set(three.tolist()) > {0}
    assert not two.equal(three)


def test_labels_are_drawn_from_each_class(tmp_path: Path) -> None:
    data = intents.load(some_intents(tmp_path / "one.json", 3))["train"]
    first, again, other = (drawn(data, [2, 1, 99], seed) for seed in (0, 0, 1))
    assert first.labels.bincount().tolist() == [2, 1, 55]
    assert first.images.equal(again.images)
    assert not first.images[:3].equal(other.images[:3])


def test_pictures_of_a_folder_and_of_an_npz_are_equal(tmp_path: Path) -> None:
    found = cifar10.load(some_pictures(tmp_path / "one.npz"))
    assert [len(found[name].labels) for name in ("train", "test")] == [7000, 20]
    (tmp_path / "two").mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name, part in zip(names, [*range(5), -1], strict=True):
        split = found["test" if part < 0 else "train"]
        rows = slice(None) if part < 0 else slice(part * 1400, part * 1400 + 1400)
        batch = {
            b"data": split.images[rows].flatten(1).numpy(),
            b"labels": split.labels[rows].tolist(),
        }
        (tmp_path / "two" / name).write_bytes(pickle.dumps(batch))
    other = cifar10.load(tmp_path / "two")
    for name in ("train", "test"):
        assert all(map(np.array_equal, other[name], found[name]))
    assert fingerprint(found) == fingerprint(other)


@pytest.mark.parametrize("reader", [intents, cifar10])
def test_other_files_are_refused(reader: object, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("nothing")
    (tmp_path / "other.json").write_text('{"train": [1]}')
    for name in ("empty", "text.txt", "other.json", "absent"):
        with pytest.raises(ValueError, match=f"{name}.*expected"):
            reader.load(tmp_path / name)  # type: ignore[attr-defined]


def test_the_example_prints_the_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = some_intents(tmp_path / "one.json", 4)
    example.main([str(path), "--epochs", "1", "--seeds", "2", "--labels", "5"])
    assert "4 intents, 5 labels each" in (text := capsys.readouterr().out)
    assert text.count(":") == 3
    for options in (["--seeds", "1"], ["--epochs", "0"]):
        with pytest.raises(SystemExit):
            example.main([str(path), *options])
    with pytest.raises(SystemExit):
        example.main([str(tmp_path / "absent.json")])
    assert "holds no intents" in capsys.readouterr().err
