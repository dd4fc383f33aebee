"""Documents: code runs, links and figures are right, and every public name has an example."""

import ast
import doctest
import inspect
import re
import textwrap
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

import separate_loss
from tests.helpers.public_api import public_names

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\|(.*)\|$", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and code of each fenced block, the code on the line where it stands."""
    text = document.read_text()
    for found in BLOCK.finditer(text):
        line = text[: found.start(3)].count("\n")
        yield found[2], "\n" * line + textwrap.dedent(found[3])


def programs(document: Path) -> list[str]:
    return [code for language, code in blocks(document) if language == "python"]


def training_loop() -> dict[str, object]:
    """The names that README's first lines take from the reader's training loop."""
    layers = {"body": torch.nn.Linear(20, 64), "fc": torch.nn.Linear(64, 7)}
    model = torch.nn.Sequential(OrderedDict(layers))
    return {"model": model, "images": torch.randn(32, 20), "labels": torch.arange(32) % 7}


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS if programs(path)],
)
def test_code_runs(document: Path) -> None:
    """Runs the blocks of a document one after the other, as a reader would."""
    namespace = training_loop() if document.name == "README.md" else {}
    for code in programs(document):
        exec(compile(code, document, "exec"), namespace)


def test_no_python_hides_under_another_name() -> None:
    """A block without a language holds commands, or their output."""
    languages = {language for path in DOCUMENTS for language, _ in blocks(path)}
    assert languages <= {"", "bibtex", "python"}
    assert {path.name for path in DOCUMENTS if programs(path)} >= {
        "README.md",
        "guide.md",
        "quality.md",
        "recipes.md",
        "theory.md",
    }


def links(document: Path) -> Iterator[tuple[bool, str, Path, str | None]]:
    """Each link outside of code: whether it is a picture, its text, target and anchor."""
    text = re.sub(r"`[^`\n]+`", "code", BLOCK.sub("", document.read_text()))
    for picture, label, path, anchor in LINK.findall(text):
        yield bool(picture), label, (document.parent / path if path else document), anchor or None


def headings(document: Path) -> set[str]:
    """Anchors of a page, as the site generator and GitHub make them."""
    found = re.findall(r"^#+ (.*)$", BLOCK.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_what_the_site_does_not_check(name: str) -> None:
    """`make docs` fails at a broken link in docs/."""
    for _, _, target, anchor in links(ROOT / name):
        assert target.exists(), target
        assert anchor is None or anchor in headings(target), f"{target}#{anchor}"


def rows(document: Path) -> list[list[str]]:
    """The cells of each table row."""
    found = ROW.findall(document.read_text())
    return [[cell.strip() for cell in row.split("|")] for row in found]


@pytest.mark.parametrize(("name", "count"), [("README.md", 1), ("docs/quality.md", 3)])
def test_tables_of_the_study_are_copied_unchanged(name: str, count: int) -> None:
    measured = (ROOT / "docs" / "benchmarks" / "quality" / "tables.md").read_text()
    tables = re.findall(r"^\| data \|.*\n(?:\|.*\n)+", (ROOT / name).read_text(), re.MULTILINE)
    assert len(tables) == count
    for table in tables:
        assert table in measured


def literals(node: ast.AST) -> str:
    """The text of a string in source code, with "..." for its values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literals(part) for part in node.values)
    return "..."


def test_messages_of_the_guide_are_those_of_the_package() -> None:
    texts = [
        literals(node)
        for path in Path(separate_loss.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Constant, ast.JoinedStr))
    ]
    guide = (ROOT / "docs" / "guide.md").read_text()
    section = guide.split("Messages, as they are:")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(quoted) > 15
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("...")))
        assert any(re.search(pattern, text) for text in texts), message


def test_copied_costs_are_those_that_were_measured() -> None:
    """Run again, the benchmarks change these pages: copy the figures then."""
    docs = ROOT / "docs"
    known = {
        cell
        for name in ("speed.md", "scale.md")
        for row in rows(docs / "benchmarks" / name)
        for cell in row
    }
    copied = [row for row in rows(docs / "cost.md") if len(row) > 5]
    shown = {
        cell for row in copied for cell in row[1:] if re.fullmatch(r"[\d.]+ (\wiB|\w?s)", cell)
    }
    assert len(shown) > 50
    assert shown <= known


def test_files_beside_the_pages_are_small() -> None:
    """They are committed anew whenever they are measured again."""
    files = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    sizes = {
        path: path.stat().st_size for path in files if path.suffix in {".json", ".png", ".svg"}
    }
    assert {path.suffix for path in files if "__pycache__" not in path.parts} <= {
        *(path.suffix for path in sizes),
        ".css",
        ".md",
        ".py",
    }
    assert sum(size for path, size in sizes.items() if path.suffix == ".json") < 400_000
    assert all(size < 120_000 for path, size in sizes.items() if path.suffix != ".json")
    assert sum(sizes.values()) < 1_000_000


def pictures() -> Iterator[tuple[Path, str]]:
    for document in DOCUMENTS:
        yield from ((path.resolve(), text) for shown, text, path, _ in links(document) if shown)


def test_pictures_have_an_alternative_text() -> None:
    found = list(pictures())
    assert {"demo.png", "cost.svg"} <= {path.name for path, _ in found}
    for path, text in found:
        assert path.exists(), path
        assert len(text.split()) >= 5, f"{path}: {text!r}"


@pytest.mark.parametrize(
    "path", sorted({path for path, _ in pictures()}), ids=lambda path: path.name
)
def test_pictures_stand_on_white(path: Path) -> None:
    """Black on transparent would be invisible on a dark page."""
    if path.suffix == ".svg":
        background = re.search(r'<g id="patch_1">.*?</g>', path.read_text(), re.DOTALL)
        assert background
        assert "fill: #ffffff" in background[0]
    else:
        corners = imread(path)[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert (corners == 1).all()


def test_every_public_name_has_an_example() -> None:
    without = [
        name
        for name, value in public_names().items()
        if not doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")
    ]
    assert not without


def test_documents_name_the_version() -> None:
    version = separate_loss.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    (released,) = re.findall(r"\ndate-released: (.*)\n", citation)
    assert f"\n## [{version}] - {released}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_cites_the_paper_as_the_citation_file_does() -> None:
    (entry,) = [code for language, code in blocks(ROOT / "README.md") if language == "bibtex"]
    fields = dict(re.findall(r"(\w+) = \{([^}]*)\}", entry))
    paper = (ROOT / "CITATION.cff").read_text().split("preferred-citation:")[1]
    for field in ("title", "volume", "year"):
        assert f"\n  {field}: {fields[field]}\n" in paper + "\n"
    first, last = fields["pages"].split("--")
    assert f"\n  start: {first}\n  end: {last}\n" in paper
    authors = re.findall(r"family-names: (\w+), given-names: ([\w.]+)", paper)
    assert fields["author"] == " and ".join(f"{family}, {given}" for family, given in authors)


def test_features_given_by_hand_are_those_of_their_labels() -> None:
    """In each block of the recipes, features and logits belong to the samples of their labels."""
    (setting, *ways) = [
        code for code in programs(ROOT / "docs" / "recipes.md") if "segment" not in code
    ]
    namespace: dict[str, Any] = {}
    exec(setting, namespace)
    criterion, model = namespace["criterion"], namespace["model"]
    inputs, labels = namespace["inputs"], namespace["labels"]
    checked = []

    class Spy:
        def __call__(
            self, logits: Tensor, target: Tensor, features: Tensor | None = None
        ) -> Tensor:
            seen, known = logits, model(inputs)
            if features is not None:
                seen, known = features, model[0](inputs)
            distance, sample = (seen[:, None] - known).norm(dim=-1).min(1)
            assert distance.max() < 1e-5
            counted = target != -100
            assert torch.equal(target[counted], labels[sample][counted])
            checked.append(features is not None)
            loss: Tensor = criterion(logits, target, features=features)
            return loss

        def eval(self) -> "Spy":
            criterion.eval()
            return self

        def __getattr__(self, name: str) -> Any:
            return getattr(criterion, name)

    namespace["criterion"] = Spy()
    for code in ways:
        exec(code, namespace)
    assert len(checked) == 8
    assert sum(checked) == 5
