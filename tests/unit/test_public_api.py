"""The public names and their signatures are those on record."""

from __future__ import annotations

import difflib
from pathlib import Path

from tests.support.public_api import STORAGE, api

RECORD = Path(__file__).with_name("public_api.txt")
AGAIN = "if that is as it should be: python -m tests.support.public_api > tests/unit/public_api.txt"


def test_the_public_api_is_the_one_on_record() -> None:
    changed = difflib.unified_diff(RECORD.read_text().splitlines(), api().splitlines(), lineterm="", n=0)
    assert not (lines := [line for line in changed if line[:2] not in ("--", "++", "@@")]), (
        "\n".join(lines) + f"\n{AGAIN}"
    )


def test_the_storages_seam_is_what_its_face_exports() -> None:
    import dcp_async.storage

    assert set(STORAGE) <= set(dcp_async.storage.__all__)
