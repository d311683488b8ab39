"""Some saves of what `nox -s soak` does thousands of, and whether it would tell what grows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from tests.faults import soak


def test_forty_saves_with_retention_hold_no_more_than_four_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "samples.csv"
    monkeypatch.setattr(
        sys, "argv", ["soak", "--saves=40", "--minutes=0", f"--dir={tmp_path}", f"--csv={table}"]
    )
    status, out = soak.main(), capsys.readouterr().out
    assert status == 0, out
    assert out.endswith("nothing has grown\n")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["saves"]) for row in rows] == list(range(1, 41))
    assert {row["checkpoints"] for row in rows[soak.KEEP :]} == {str(soak.KEEP)}
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize("name", ["descriptors", "threads", "rss", "checkpoints", "files", "disk"])
def test_soak_tells_what_has_grown(name: str) -> None:
    first = soak.Sample(
        saves=4, seconds=1.0, descriptors=9, threads=4, rss=1 << 28, checkpoints=3, files=9, disk=1 << 22
    )
    grown = first._replace(saves=8, **{name: getattr(first, name) * 8})
    assert soak.growth([first, first._replace(saves=8)]) == []
    (words,) = soak.growth([first, grown])
    assert words.startswith(f"from 8 saves on: {name} ")
