"""The order in which a save makes things durable: what a power cut may take is decided here, not by a kill.

The log holds begin and end of every changing call of the saving process (tests/faults/calls.py). A call
counts as done before another one only if it has ended when that one begins.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.calls import RENAMES, SYNCS, UNLINKS, WRITES
from tests.faults.harness import Nursery
from tests.faults.states import versions

CONTENT = WRITES | {"truncate", "ftruncate", "posix_fallocate"}


class Log:
    """Questions about a recorded save; positions are indices into the log."""

    def __init__(self, entries: list[list[str]]) -> None:
        self.entries = [tuple(entry) for entry in entries]

    def at(self, moment: str, names: frozenset[str], path: str, *, target: str = "") -> list[int]:
        return [
            index
            for index, (when, name, where, onto) in enumerate(self.entries)
            if when == moment and name in names and where == path and target in ("", onto)
        ]

    def publishing(self) -> tuple[int, int, str]:
        """Begin and end of the link or rename that makes `.metadata`, and where it came from."""
        found = [
            (index, source)
            for index, (when, name, source, target) in enumerate(self.entries)
            if when == "begin" and (name == "link" or name in RENAMES) and target.endswith("/.metadata")
        ]
        assert len(found) == 1, f"{len(found)} publishing calls"
        begin, source = found[0]
        target = self.entries[begin][3]
        end = next(i for i, e in enumerate(self.entries) if i > begin and e[0] == "end" and e[3] == target)
        return begin, end, source

    def touched(self, suffix: str) -> set[str]:
        return {
            path
            for when, name, path, _ in self.entries
            if when == "begin" and (name in CONTENT or name == "open") and path.endswith(suffix)
        }

    def synced_between(self, path: str, start: int, stop: int) -> bool:
        """Whether a sync of `path` began after `start` and ended before `stop`."""
        begins = [i for i in self.at("begin", SYNCS, path) if i > start]
        return any(b < e < stop for b in begins for e in self.at("end", SYNCS, path))


def recorded(nursery: Nursery, root: Path, *, replace: bool) -> Log:
    nursery.run("save", root=root, version=1, step=1)
    return Log(
        nursery.run("save", root=root, version=2, step=1 if replace else 2, replace=replace, record=True)[
            "log"
        ]
    )


BOTH = pytest.mark.parametrize("replace", [False, True], ids=["fresh", "replace"])


@BOTH
def test_every_file_is_synced_before_metadata_is_published(
    nursery: Nursery, root: Path, replace: bool
) -> None:
    log = recorded(nursery, root, replace=replace)
    begin, _, source = log.publishing()
    data, manifests = log.touched(".distcp"), {p for p in log.touched(".json") if "/manifest-" in p}
    assert len(data) >= 1
    assert len(manifests) == 1
    assert source.endswith(".tmp")
    for path in data | manifests | {source}:
        changes = log.at("end", CONTENT | {"open"}, path)
        assert changes, path
        assert max(changes) < begin, f"{path} is changed after .metadata was published"
        assert log.synced_between(path, max(changes), begin), (
            f"{path} is not durable when .metadata is published"
        )


@BOTH
def test_directory_and_root_are_synced_before_the_save_counts_as_committed(
    nursery: Nursery, root: Path, replace: bool
) -> None:
    log = recorded(nursery, root, replace=replace)
    _, end, _ = log.publishing()
    directory = str(root / ("step-00000001" if replace else "step-00000002"))
    done = log.entries.index(("end", "committed", "", ""))
    assert log.synced_between(directory, end, done), "the name .metadata is not durable"
    made = max([-1, *log.at("end", frozenset({"mkdir"}), directory)])
    assert log.synced_between(str(root), made, done), "the directory's own name is not durable"


def test_replaced_files_are_unlinked_only_after_the_directory_is_synced(nursery: Nursery, root: Path) -> None:
    directory = root / "step-00000001"
    nursery.run("save", root=root, version=1, step=1)
    old = {str(path) for path in directory.iterdir() if path.name != ".metadata"}
    log = Log(nursery.run("save", root=root, version=2, step=1, replace=True, record=True)["log"])
    _, end, _ = log.publishing()
    for path in old:
        unlinked = log.at("begin", UNLINKS, path)
        assert len(unlinked) == 1, f"{path} is unlinked {len(unlinked)} times"
        assert log.synced_between(str(directory), end, unlinked[0]), (
            f"{path} goes before the new name is durable"
        )


@BOTH
def test_lease_is_locked_before_the_first_file_and_released_after_publishing(
    nursery: Nursery, root: Path, replace: bool
) -> None:
    log = recorded(nursery, root, replace=replace)
    _, end, _ = log.publishing()
    directory = str(root / ("step-00000001" if replace else "step-00000002"))
    opened = {path: log.at("begin", frozenset({"open"}), path) for path in log.touched("")}
    # A save may try the leases of others before; its own one carries the uid of its data files.
    uids = {path.rsplit("-", 1)[1].removesuffix(".distcp") for path in log.touched(".distcp")}
    leases = [f"{directory}/.lease-{uid}" for uid in uids]
    assert len(leases) == 1
    locked = log.at("end", frozenset({"flock"}), leases[0])
    others = [
        index
        for path, moments in opened.items()
        if path.startswith(f"{directory}/") and "/.lease-" not in path
        for index in moments
    ]
    assert locked
    assert min(locked) < min(others), "a file is made before the lease is held"
    assert all(index > end for index in log.at("begin", UNLINKS, leases[0])), (
        "the lease goes before publishing"
    )


def test_fresh_save_touches_no_file_of_another_checkpoint(nursery: Nursery, root: Path) -> None:
    log = recorded(nursery, root, replace=False)
    foreign = [entry for entry in log.entries if entry[2].startswith(f"{root}/step-00000001/")]
    assert [entry for entry in foreign if "/.lease-" not in entry[2]] == []


MOST_SYNCS = 20
"""A bound for the sweep; a save of one data file makes far fewer."""


@BOTH
def test_failing_sync_is_final_though_another_one_would_succeed(
    nursery: Nursery, root: Path, replace: bool, kills: int
) -> None:
    # The system reports an error of writing back once: a second sync succeeds, and the bytes are lost.
    base, step, kinds = root / "base", 1 if replace else 2, set()
    nursery.run("save", root=base, version=1, step=1)
    for nth in range(1, MOST_SYNCS):
        work = root / str(nth)
        shutil.copytree(base, work)
        child = nursery.start(
            "save", root=work, version=2, step=step, replace=replace, record=True, sync_fails_at=nth
        )
        child.finish()
        (outcome,) = child.said("outcome")
        if not child.said("fails"):
            assert outcome["outcome"] == "committed"
            break
        path = child.said("fails")[0]["path"]
        log = Log(child.said("done")[0]["log"])
        published = any(target.endswith("/.metadata") for _, _, _, target in log.entries)
        assert outcome["outcome"] == "failed", path
        assert any(link["errno"] == "EIO" for link in outcome["chain"]), path
        if path in (str(work), str(work / f"step-{step:08}")):
            kinds.add("directory")
        else:
            kinds.add(Path(path).suffix)
            assert len(log.at("begin", SYNCS, path)) == 1, f"{path} is synced again"
            assert not published, f"{path} is not durable, and .metadata was made"
        # a fresh one is taken away again; what replace has overwritten can't come back
        old = {"step-00000001": 2 if replace and published else 1}
        if kills >= 50 or nth % 3 == 0:  # by default what each third one leaves
            left = nursery.run("inspect", root=work, kind="numbers", then_save=True)
            assert versions(left, when=f"after a failing sync of {path}") == old
            assert versions(left["swept"], when="swept after it") == old | {"step-00000900": 0}
            assert left["swept"]["leftovers"] == [], path
        nursery.forget(child)
        shutil.rmtree(work)
    assert kinds == {".distcp", ".json", ".tmp", "directory"}
