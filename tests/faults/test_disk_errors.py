"""A disk that is full or refuses, by real means: file-size limits and small tmpfs mounts.

The error names checkpoint, file and cause, what was there stays readable, and the next save that fits works.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.harness import Child, Nursery, Report
from tests.faults.mounts import small_ext4, small_tmpfs

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory that takes only so much, where it could be mounted."""

    path: Path
    mounted: bool


@pytest.fixture
def small_disk(tmp_path: Path, tell: Callable[[object], None]) -> Iterator[Disk]:
    with full_disk(tmp_path, "tmpfs", tell) as disk:
        yield disk


@contextlib.contextmanager
def full_disk(place: Path, kind: str, tell: Callable[[object], None]) -> Iterator[Disk]:
    """A file system that takes 12 MiB; any directory, and word of it, where none can be mounted."""
    path = place / "disk"
    path.mkdir()
    with small_tmpfs(path, 12 * MIB) if kind == "tmpfs" else small_ext4(path, 16 * MIB) as mounted:
        if not mounted:
            tell(f"no {kind} can be mounted here: a limit of the size of files stands for a full one")
        yield Disk(path, mounted)


def outcomes(child: Child) -> list[str]:
    return [report["outcome"] for report in child.said("outcome")]


def check_failure(report: Report, error: str) -> None:
    """The first error is the SaveError; the text and the causes must lead to file and reason."""
    top = report["chain"][0]
    assert top["type"] == "SaveError"
    assert top["id"] == f"step-{report['step']:08}"
    assert top["step"] == report["step"]
    assert top["phase"] in ("write", "commit")
    assert list(top["failures"]) == ["0"]
    assert any(link["errno"] == error for link in report["chain"]), report["chain"]
    assert top["id"] in top["text"]
    assert any(".distcp" in link["text"] for link in report["chain"]), report["chain"]
    reason = os.strerror(getattr(__import__("errno"), error))
    assert reason in top["text"], f"the message does not say why: {top['text']}"


def test_save_beyond_the_file_size_limit_fails_clearly_and_the_next_one_works(
    nursery: Nursery, root: Path
) -> None:
    child = nursery.start("fill_up", root=root, sizes=[1, 9, 1], limit=4)
    child.finish()
    assert outcomes(child) == ["committed", "failed", "committed"]
    check_failure(child.said("outcome")[1], "EFBIG")
    assert child.said("readable")[0]["good"] == [0, 2]
    assert child.said("readable")[0]["steps"] == [0, 2]
    assert child.said("readable")[0]["leftovers"] == []
    assert child.said("closed"), "close() raised a failure that had been looked at"


def test_save_on_a_full_disk_fails_clearly_and_gives_the_space_back(
    nursery: Nursery, small_disk: Disk
) -> None:
    # 12 MiB: 3 fit, 12 do not, then 6 fit only if the failed save took its files with it.
    child = nursery.start(
        "fill_up", root=small_disk.path / "run", sizes=[3, 12, 6], limit=0 if small_disk.mounted else 8
    )
    child.finish()
    assert outcomes(child) == ["committed", "failed", "committed"]
    check_failure(child.said("outcome")[1], "ENOSPC" if small_disk.mounted else "EFBIG")
    assert child.said("readable")[0]["good"] == [0, 2]
    assert child.said("readable")[0]["leftovers"] == []
    assert child.said("closed")


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_replacement_on_a_full_disk_fails_clearly_and_leaves_what_it_was_to_replace(
    nursery: Nursery, tmp_path: Path, kind: str, tell: Callable[[object], None]
) -> None:
    # 3 lie there, so 12 more do not fit, and 6 do only if those of the failed one have gone
    with full_disk(tmp_path, kind, tell) as disk:
        limit = 0 if disk.mounted else 8
        root = disk.path / "run"
        child = nursery.start("fill_up", root=root, sizes=[3, 12, 6], limit=limit, replace=True)
        child.finish()
    assert outcomes(child) == ["committed", "failed", "committed"]
    check_failure(child.said("outcome")[1], "ENOSPC" if disk.mounted else "EFBIG")
    assert [report["label"] for report in child.said("there")] == [f"'version {n}'" for n in (0, 0, 2)]
    assert all(report["whole"] for report in child.said("there"))
    assert child.said("readable")[0]["leftovers"] == []
    assert child.said("closed")


def test_save_works_once_space_has_been_freed(nursery: Nursery, small_disk: Disk) -> None:
    filler = small_disk.path / "filler"
    filler.write_bytes(bytes(7 * MIB))
    limit = 0 if small_disk.mounted else 4
    first = nursery.start("fill_up", root=small_disk.path / "run", sizes=[1, 9], limit=limit)
    first.finish()
    assert outcomes(first) == ["committed", "failed"]
    assert first.said("readable")[0]["good"] == [0]
    filler.unlink()
    second = nursery.start("save", root=small_disk.path / "run", version=4, step=4)
    second.finish()
    assert outcomes(second) == ["committed"]


def test_root_on_tmpfs_works_without_a_warning(nursery: Nursery, small_disk: Disk) -> None:
    child = nursery.start("fill_up", root=small_disk.path / "run", sizes=[1, 2, 1])
    child.finish()
    assert outcomes(child) == ["committed"] * 3
    assert child.said("readable")[0]["good"] == [0, 1, 2]
    assert child.stderr() == ""


def test_file_system_without_direct_io_works_without_a_warning(nursery: Nursery, root: Path) -> None:
    child = nursery.start("save_without_direct_io", root=root)
    child.finish()
    assert child.said("readable")[0]["good"] == [True, True]
    assert child.stderr() == ""
