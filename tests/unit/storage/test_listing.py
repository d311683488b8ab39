"""A listing of a large root: what is trusted, what is looked at again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dcp_async._names import METADATA, step_directory
from dcp_async.storage.local.files import commit_mark
from dcp_async.storage.local.listing import Listing

MANY = 300


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were looked at."""
    names: list[str] = []

    def look(path: str) -> object:
        names.append(Path(path).name)
        return commit_mark(path)

    monkeypatch.setattr("dcp_async.storage.local.listing.commit_mark", look)
    return names


def write(root: Path, name: str) -> None:
    (root / name).mkdir()
    (root / name / METADATA).write_bytes(b"")


def test_of_many_steps_that_are_known_the_newest_are_looked_at_again(
    tmp_path: Path, looked_at: list[str]
) -> None:
    for step in range(MANY):
        write(tmp_path, step_directory(step))
    write(tmp_path, "best")
    root = Listing(tmp_path)
    assert len(root.look()) == len(looked_at) == MANY + 1
    looked_at.clear()
    before = root.look()
    assert set(looked_at) == {"best", *map(step_directory, range(MANY - 256, MANY))}
    (tmp_path / step_directory(MANY - 1) / METADATA).unlink()
    (tmp_path / step_directory(0) / METADATA).unlink()
    (tmp_path / step_directory(0)).rmdir()
    (tmp_path / step_directory(1)).rename(tmp_path / ".moved")
    (tmp_path / step_directory(1)).symlink_to(".moved")
    write(tmp_path, step_directory(1 << 40))
    after = {stored.name: stored for stored in root.look()}
    assert after.keys() ^ {stored.name for stored in before} == {step_directory(0), step_directory(1 << 40)}
    assert [name for name, stored in after.items() if not stored.committed] == [step_directory(MANY - 1)]
    assert after[step_directory(1)].version == ""


def test_what_was_replaced_has_another_version(tmp_path: Path) -> None:
    write(tmp_path, step_directory(1))
    root = Listing(tmp_path)
    (before,) = root.look()
    (tmp_path / "new").write_bytes(b"")
    (tmp_path / "new").rename(tmp_path / step_directory(1) / METADATA)
    (after,) = root.look()
    assert before.version != after.version
