"""What the documents show runs, and every public name shows how it is used."""

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import separate_loss
from tests.public_api import public_names

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """Language and code of each fenced block, the code on the line where it stands."""
    text = document.read_text()
    for found in BLOCK.finditer(text):
        line = text[: found.start(3)].count("\n")
        yield found[2], "\n" * line + textwrap.dedent(found[3])


def programs(document: Path) -> list[str]:
    return [code for language, code in blocks(document) if language == "python"]


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS if programs(path)],
)
def test_code_runs(document: Path) -> None:
    """The blocks of a document, one after the other, as a reader would run them."""
    namespace: dict[str, object] = {}
    for code in programs(document):
        exec(compile(code, document, "exec"), namespace)


def test_no_python_hides_under_another_name() -> None:
    """In a block without a language there are commands, or what they print."""
    languages = {language for path in DOCUMENTS for language, _ in blocks(path)}
    assert languages <= {"", "python"}
    assert {path.name for path in DOCUMENTS if programs(path)} >= {"README.md", "maths.md"}


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
