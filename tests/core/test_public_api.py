"""Public names and signatures equal the snapshot."""

import difflib

from tests.helpers.public_api import COMMAND, SNAPSHOT, describe


def test_names_and_signatures_equal_the_snapshot() -> None:
    known, found = SNAPSHOT.read_text().splitlines(), describe().splitlines()
    changes = list(difflib.unified_diff(known, found, "known", "found", lineterm="", n=2))
    assert not changes, (
        f"Public names or signatures changed. If that is intended, add it to CHANGELOG.md and run "
        f"`{COMMAND}`.\n" + "\n".join(changes)
    )
