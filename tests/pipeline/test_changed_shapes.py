"""docs/reference/changed-shapes.md says what a load does with what changed; here that is found out."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.support import changed_shapes
from tests.support.changed_shapes import GROUPS, Row, page, tables

PAGE = Path(changed_shapes.__file__).parents[2] / "docs" / "reference" / "changed-shapes.md"
AGAIN = (
    "if that is as it should be: python -m tests.support.changed_shapes > docs/reference/changed-shapes.md"
)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Row]]:
    return tables()


def test_the_page_says_what_is_found(found: dict[str, list[Row]]) -> None:
    committed = PAGE.read_text().splitlines() if PAGE.exists() else []
    lines = difflib.unified_diff(committed, page(found).splitlines(), PAGE.name, "found", lineterm="", n=0)
    changes = "\n".join(lines)
    assert not changes, f"{changes}\n{AGAIN}"


def test_each_kind_has_tables_of_its_own() -> None:
    assert len({group.title for group in GROUPS}) == len(GROUPS) == 8


@pytest.mark.parametrize(
    "title", [group.title for group in GROUPS if "Stateful" in group.title or "_extra" in group.title]
)
def test_what_describes_itself_gets_all_that_it_saved(found: dict[str, list[Row]], title: str) -> None:
    assert {(row.strict, row.lenient) for row in found[title]} == {("the checkpoint's", "the checkpoint's")}


def test_no_load_fails_late_and_none_is_silent(found: dict[str, list[Row]]) -> None:
    for rows in found.values():
        for row in rows:
            for outcome in (row.strict, row.lenient):
                assert "LoadError" not in outcome, row
                silent = outcome in ("its own", "what fits")
                assert not silent, f"{row}: what was not taken is in the report"
