"""A checkpoint is read whole, and each damaged byte of it is told: file, range, and the names in it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    DamagedRange,
    StorageError,
    VerifyReport,
    sync,
    verify,
)
from dcp_async.catalog import verification
from tests.support.doubles import data_files, faulty_storage, flip, manifest_file, raw_bytes

BLOCK = 64 << 10


def make_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(300, 200, generator=generator),
        "large": torch.randn(1 << 19, generator=generator),
        "many": {str(number): torch.full((3,), float(number)) for number in range(50)},
        "sparse": torch.eye(5).to_sparse(),
        "epoch": 3,
    }


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> Path:
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save(make_state(), step=1)
    return tmp_path / "step-00000001"


def items_of(path: Path) -> Mapping[str, Sequence[tuple[str, int, int]]]:
    """File -> (name, start, stop) of its items, as stock's reader sees them."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    found: dict[str, list[tuple[str, int, int]]] = {}
    for index, stored in metadata.storage_data.items():
        found.setdefault(stored.relative_path, []).append(
            (index.fqn, stored.offset, stored.offset + stored.length)
        )
    return found


def one(report: VerifyReport) -> DamagedRange:
    (damage,) = report.damage
    assert not report.ok
    return damage


async def test_a_whole_checkpoint_is_read_to_its_last_byte(path: Path) -> None:
    report = await verify(path)
    assert report.ok
    assert (report.checkpoint_id, report.producer) == ("step-00000001", "dcp_async")
    assert (report.unrecorded, report.num_files) == ((), 1)
    # all but the footer, which was read to be believed
    (file,) = data_files(path)
    assert file.stat().st_size - 8192 <= report.nbytes < file.stat().st_size


async def test_neighbouring_blocks_are_told_as_one_range(path: Path) -> None:
    (file,) = data_files(path)
    for block in (2, 3, 4, 9):
        flip(file, block * BLOCK + 7)
    first, second = (await verify(path)).damage
    assert (first.start, first.stop) == (2 * BLOCK, 5 * BLOCK)
    assert (second.start, second.stop) == (9 * BLOCK, 10 * BLOCK)
    assert "large" in second.names
    assert "checksum" in first.reason


async def test_a_file_that_is_cut_off_or_gone_is_told_with_all_that_lay_in_it(path: Path) -> None:
    (file,) = data_files(path)
    names = {name for name, *_ in items_of(path)[file.name]}
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    damage = one(await verify(path))
    assert (damage.file, damage.start, damage.stop) == (file.name, 0, len(whole))
    assert set(damage.names) == names
    assert f"{len(whole) - 1} bytes instead of {len(whole)}" in damage.reason
    file.unlink()
    damage = one(await verify(path))
    assert (damage.file, set(damage.names)) == (file.name, names)


async def test_data_is_judged_though_the_manifest_is_damaged(path: Path) -> None:
    (file,) = data_files(path)
    flip(manifest_file(path), 10)
    flip(file, 5)
    report = await verify(path)
    assert {damage.file for damage in report.damage} == {file.name, manifest_file(path).name}
    assert report.producer == "dcp_async"


def stock_save(path: Path) -> None:
    state = make_state()
    del state["sparse"]  # which stock can't write
    dcp.save(state, checkpoint_id=path, no_dist=True)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    stock_save(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize("chunk", [8 << 20, 128 << 10])
async def test_a_damaged_item_of_stocks_is_told(
    stock: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_CHUNK_BYTES", chunk)  # the smaller one reads `large` in pieces
    report = await verify(stock)
    assert report.ok
    assert (report.producer, report.unrecorded) == ("stock", ())
    ((file, items),) = items_of(stock).items()
    state = make_state()
    values = {"w": state["w"], "large": state["large"], "many.7": state["many"]["7"], "epoch": None}
    for name, tensor in values.items():
        start, stop = next((start, stop) for fqn, start, stop in items if fqn == name)
        item = (stock / file).read_bytes()[start:stop]
        # of a tensor its first element, of a leaf a byte of its pickle
        position = start + (66 if tensor is None else item.index(raw_bytes(tensor)))
        flip(stock / file, position)
        damage = one(await verify(stock))
        flip(stock / file, position)
        assert (damage.file, damage.start, damage.stop, damage.names) == (file, start, stop, (name,))


@pytest.mark.parametrize("chunk", [8 << 20, 128 << 10])
async def test_what_stock_recorded_no_checksum_of_is_said(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_CHUNK_BYTES", chunk)
    torch.serialization.set_crc32_options(False)
    try:
        stock_save(tmp_path / "stock")
    finally:
        torch.serialization.set_crc32_options(True)
    report = await verify(tmp_path / "stock")
    assert report.ok
    assert {"w", "large", "many.0"} <= set(report.unrecorded)
    ((file, items),) = items_of(tmp_path / "stock").items()
    os.truncate(tmp_path / "stock" / file, max(stop for *_, stop in items) - 1)
    assert set(one(await verify(tmp_path / "stock")).names) == {name for name, *_ in items}


async def test_only_the_block_that_the_medium_has_lost_is_condemned(path: Path, tmp_path: Path) -> None:
    lost = 5 * BLOCK + 17

    async with faulty_storage(tmp_path) as storage, CheckpointEngine(storage) as engine:
        error = StorageError("sector", verb="read", path="x", errno=errno.EIO)
        storage.fail_if(
            "read_into",
            error,
            lambda args: any(
                offset <= lost < offset + len(memory) for offset, memory in args[1] if len(memory) > 9000
            ),
        )
        damage = one(await engine.verify(1))
    assert (damage.start, damage.stop) == (5 * BLOCK, 6 * BLOCK)
    assert "sector" in damage.reason


async def test_a_medium_that_is_away_is_no_damage(path: Path, tmp_path: Path) -> None:
    async with faulty_storage(tmp_path) as storage, CheckpointEngine(storage) as engine:
        storage.fail("read_into", StorageError("away", verb="read", path="x", errno=errno.ETIMEDOUT), nth=2)
        with pytest.raises(StorageError, match="away"):
            await engine.verify()
        storage.heal()
        assert (await engine.verify()).ok


async def test_latest_is_the_newest_though_it_is_damaged(path: Path, tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save(make_state(), step=2)  # verify waits for it, as load does
        assert (await engine.verify()).checkpoint_id == "step-00000002"
        flip(data_files(tmp_path / "step-00000002")[0], 100)
        assert not (await engine.verify()).ok
        assert (await engine.verify(1)).ok
        assert await engine.load(make_state()) is not None
        with pytest.raises(CheckpointNotFoundError):
            await engine.verify(3)


async def test_a_checkpoint_that_is_replaced_meanwhile_is_read_again(path: Path, tmp_path: Path) -> None:
    async with faulty_storage(tmp_path) as storage, CheckpointEngine(storage) as reader:
        with storage.hold("size") as gate:
            reading = asyncio.ensure_future(reader.verify(1))
            await gate.until_arrived()
            async with CheckpointEngine(tmp_path) as writer:
                await writer.save(make_state(), step=1, replace=True)
        assert (await reading).ok


def test_the_blocking_twin_and_bad_paths(tmp_path: Path) -> None:
    with sync.CheckpointEngine(tmp_path) as engine:
        engine.save(make_state(), step=1)
        assert engine.verify().ok
    assert sync.verify(tmp_path / "step-00000001").ok
    with pytest.raises(CheckpointNotFoundError, match="not that of a run"):
        sync.verify(tmp_path)
    metadata = tmp_path / "step-00000001" / ".metadata"
    metadata.unlink()
    metadata.mkdir()
    with pytest.raises(CorruptCheckpointError):
        sync.verify(tmp_path / "step-00000001")


@pytest.mark.parametrize("url", ["memory://verified/step-00000001", "file://{}/step-00000001"])
async def test_urls_are_verified(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path)
    async with CheckpointEngine(url.rpartition("/")[0]) as engine:
        await engine.save(make_state(), step=1)
    assert (await verify(url)).ok
