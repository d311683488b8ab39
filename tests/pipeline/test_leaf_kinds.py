"""docs/reference/leaf-kinds.md says what becomes of each kind of leaf; here it is found out and compared."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import leaf_kinds
from tests.support.leaf_kinds import GROUPS, Row, page, tables

PAGE = Path(leaf_kinds.__file__).parents[2] / "docs" / "reference" / "leaf-kinds.md"
AGAIN = "if that is as it should be: python -m tests.support.leaf_kinds > docs/reference/leaf-kinds.md"


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, list[Row]]]:
    """Kinds are made with seeded generators; the next test gets its own back."""
    kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield tables()
    torch.set_rng_state(kept[0])
    random.setstate(kept[1])
    np.random.set_state(kept[2])


@pytest.fixture
def rows(found: dict[str, list[Row]]) -> list[Row]:
    return [row for group in found.values() for row in group]


def test_the_page_says_what_is_found(found: dict[str, list[Row]]) -> None:
    committed = PAGE.read_text().splitlines() if PAGE.exists() else []
    lines = difflib.unified_diff(committed, page(found).splitlines(), PAGE.name, "found", lineterm="", n=0)
    changes = "\n".join(lines)
    assert not changes, f"{changes}\n{AGAIN}"


def test_each_kind_has_a_row_of_its_own() -> None:
    names = [kind.name for kinds in GROUPS.values() for kind in kinds]
    assert len(set(names)) == len(names)
    assert len(names) > 60


def test_what_save_takes_read_gives_back(rows: list[Row]) -> None:
    """Whatever the page says: nothing may be lost on the way."""
    kept = ("the same", "its `state_dict()`", "`dict`")
    assert [row for row in rows if row.stored != "refused" and not row.read.startswith(kept)] == []


def test_only_a_time_zone_by_name_needs_unsafe_trust(rows: list[Row]) -> None:
    """Its pickle calls getattr, which no list of names can allow."""
    assert [row.kind for row in rows if "unsafe" in row.trust] == ["`zoneinfo.ZoneInfo`"]
