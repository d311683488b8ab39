"""A list of checkpoints agrees with the engine's, and is told from a look at each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, CheckpointInfo
from dcp_async.catalog import Listed, survey
from dcp_async.storage import LocalStorage, MemoryStorage, Storage
from tests.support.doubles import manifest_file


def state() -> dict[str, Any]:
    return {"w": torch.arange(6.0), "epoch": 3}


async def metadata_of(name: str) -> Any:
    raise AssertionError("nobody asks for metadata here")


async def rows(storage: Storage) -> list[Listed]:
    await storage.connect()
    try:
        return await survey(storage, metadata_of)
    finally:
        await storage.close()


def told(info: CheckpointInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in CheckpointInfo.__slots__ if name != "_metadata"}


async def test_it_tells_what_the_engine_tells_in_the_engines_order(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save(state(), step=12, notes={"loss": 0.5})).upload_completion
        await (await engine.save(state(), step=3, checkpoint_id="older")).upload_completion
        dcp.save(state(), checkpoint_id=tmp_path / "stock-7", no_dist=True)
        expected = [told(info) async for info in engine.checkpoints()]
    listed = await rows(LocalStorage(tmp_path))
    assert [told(row.info) for row in listed if row.info] == expected
    assert [info["checkpoint_id"] for info in expected] == ["older", "stock-7", "step-00000012"]
    assert not any(row.problem for row in listed)


async def test_names_that_count_are_in_the_engines_order_whatever_their_times(tmp_path: Path) -> None:
    names = ["checkpoint-7", "checkpoint-10", "other"]
    async with CheckpointEngine(tmp_path) as engine:
        for name in reversed(names):  # as a copy may leave them
            await (await engine.save(state(), checkpoint_id=name)).upload_completion
        expected = [info.checkpoint_id async for info in engine.checkpoints()]
    assert expected == ["other", "checkpoint-7", "checkpoint-10"]
    assert [row.stored.name for row in await rows(LocalStorage(tmp_path))] == expected


async def test_one_that_is_damaged_hides_no_other(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path) as engine:
        for step in (1, 2, 3):
            await (await engine.save(state(), step=step)).upload_completion
    manifest_file(tmp_path / "step-00000002").write_bytes(b'{"format":"dcp_async"')
    manifest_file(tmp_path / "step-00000003").unlink()
    first, second, third = await rows(LocalStorage(tmp_path))
    assert first.info is not None
    assert second.info is None
    assert "damaged" in second.problem
    assert third.info is None
    assert "missing" in third.problem


async def test_of_two_manifests_that_of_its_metadata_counts(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save(state(), step=1, notes={"try": 1})).upload_completion
        old = manifest_file(path)
        kept = shutil.copy(old, tmp_path / "kept")
        await (await engine.save(state(), step=1, notes={"try": 2}, replace=True)).upload_completion
    shutil.move(kept, path / old.name)
    (row,) = await rows(LocalStorage(tmp_path))
    assert row.info is not None
    assert row.info.notes == {"try": 2}


async def test_what_is_not_committed_comes_last(tmp_path: Path) -> None:
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "step-00000009" / "somebodys").touch()
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save(state(), step=1)).upload_completion
    (tmp_path / "newest").symlink_to("step-00000001")
    listed = await rows(LocalStorage(tmp_path))
    assert [(row.stored.name, row.stored.committed) for row in listed] == [
        ("step-00000001", True),
        ("newest", False),
        ("step-00000009", False),
    ]
    assert listed[1].stored.alias_of == "step-00000001"


async def test_a_manifest_of_thousands_of_files_is_read_to_its_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcp_async.catalog.listing.HEAD_BYTES", 100)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save(state(), step=5)).upload_completion
    (row,) = await rows(LocalStorage(tmp_path))
    assert row.info is not None
    assert row.info.step == 5


@pytest.mark.parametrize("notes", [{"structure": 1}, {"a": {"structure": [',"structure":']}}])
async def test_notes_may_say_structure(tmp_path: Path, notes: dict[str, Any]) -> None:
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save(state(), step=5, notes={"first": 0, **notes})).upload_completion
    (row,) = await rows(LocalStorage(tmp_path))
    assert row.info is not None
    assert row.info.notes == {"first": 0, **notes}


async def test_any_storage_is_listed() -> None:
    storage = MemoryStorage("listed")
    async with CheckpointEngine(storage) as engine:
        await (await engine.save(state(), step=4)).upload_completion
        (row,) = await survey(storage, metadata_of)
        assert row.info is not None
        assert row.info.step == 4
    await storage.close()
    MemoryStorage.clear("listed")


async def test_a_root_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert await rows(LocalStorage(tmp_path / "nothing")) == []
