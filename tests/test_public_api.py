"""Public names and signatures change on purpose only."""

import difflib

from tests.helpers.public_api import COMMAND, SNAPSHOT, describe


def test_names_and_signatures_are_those_of_the_snapshot() -> None:
    known, found = SNAPSHOT.read_text().splitlines(), describe().splitlines()
    changes = list(difflib.unified_diff(known, found, "known", "found", lineterm="", n=2))
    assert not changes, (
        f"The public names or signatures changed. If that is meant, say so in CHANGELOG.md and run "
        f"`{COMMAND}`.\n" + "\n".join(changes)
    )
