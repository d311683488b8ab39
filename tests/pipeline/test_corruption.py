"""A flipped byte anywhere is noticed, and the tensors in its block are named."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, CheckpointInfo, CorruptCheckpointError
from tests.support.doubles import (
    BLOCK_BYTES,
    assert_same,
    data_files,
    faulty_storage,
    flip,
    manifest_file,
    random_tensor,
)
from tests.support.saves import SMALL


def make_state() -> dict[str, Any]:
    tensors: dict[str, Any] = {f"t{i}": random_tensor(torch.float32, (i * 37 % 900,), i) for i in range(60)}
    tensors |= {f"big{i}": random_tensor(torch.uint8, (300_000 + i,), 100 + i) for i in range(3)}
    tensors |= {"sparse": torch.eye(50).to_sparse(), "strided": random_tensor(torch.int16, (70, 90), 200).t()}
    tensors |= {f"leaf{i}": [i, "x" * (i * 100)] for i in range(10)}
    return {"m": tensors}


def target_of(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "m": {
            name: torch.zeros(value.shape, dtype=value.dtype)
            if isinstance(value, torch.Tensor) and not value.is_sparse
            else (torch.zeros(50, 50).to_sparse() if isinstance(value, torch.Tensor) else None)
            for name, value in state["m"].items()
        }
    }


async def items_of(info: CheckpointInfo) -> dict[str, tuple[int, int]]:
    """Name to [begin, end) in the one data file."""
    metadata = await info.metadata()
    assert isinstance(metadata.storage_data, dict)
    return {
        index.fqn: (item.offset, item.offset + item.length) for index, item in metadata.storage_data.items()
    }


def positions_to_try(size: int, items: dict[str, tuple[int, int]]) -> list[int]:
    chosen = random.Random(7)
    everywhere = [chosen.randrange(size) for _ in range(60)]
    edges = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1]
    names = sorted(items)
    for name in [*names[:3], "m.big1", "m.leaf3", "m.leaf9"]:
        begin, end = items[name]
        edges += [begin, begin + 20, (begin + end) // 2, end - 1]
    footer = max(end for _, end in items.values())
    tail = [chosen.randrange(footer, size) for _ in range(20)]
    return [position for position in [*everywhere, *edges, *tail] if position < size]


@pytest.mark.parametrize("way", ["read", "load"])
async def test_a_flipped_byte_anywhere_is_noticed_and_named(root: Path, way: str) -> None:
    state = make_state()
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save(state)).upload_completion
        items = await items_of(info)
        (file,) = data_files(root / info.checkpoint_id)
        size = file.stat().st_size
        data_end = max(end for _, end in items.values())
        harmless = 0
        for position in positions_to_try(size, items):
            flip(file, position)
            block = position // BLOCK_BYTES
            in_block = {
                name
                for name, (begin, end) in items.items()
                if begin < (block + 1) * BLOCK_BYTES and end > block * BLOCK_BYTES
            }
            hit = {name for name, (begin, end) in items.items() if begin <= position < end}
            result: Any = None
            found: CorruptCheckpointError | None
            try:
                if way == "read":
                    result = await engine.read(info)
                else:
                    result = target_of(state)
                    await engine.load(result, info)
            except CorruptCheckpointError as error:
                found = error
            else:
                found = None
            if found is not None:
                assert found.checkpoint_id == info.checkpoint_id
                if position < data_end:
                    assert hit <= set(found.tensors) <= in_block, (position, hit, found.tensors)
                    assert any(name in str(found) for name in found.tensors)
            else:
                assert position >= data_end, f"a flip at {position} of {size} went unseen"
                assert_same(result, state)
                harmless += 1
            flip(file, position)
        assert harmless < 20
        assert_same(await engine.read(info), state)


class _Custom:
    """A storage, or a reader of it, that calls ``arrived`` in a way of its own."""

    def __init__(self, inner: Any, arrived: Callable[[Any], Any]) -> None:
        self._inner = inner
        self._arrived = arrived

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def open(self, name: str) -> Any:
        return _Custom(await self._inner.open(name), self._arrived)

    async def read_into(self, file: str, pieces: Any, arrived: Any = None) -> None:
        await self._inner.read_into(file, pieces, self._arrived(arrived))


def _never(arrived: Any) -> None:
    """It reads, but does not say what has arrived."""


def _deaf(arrived: Any) -> Any:
    """It does not hear what it is told, and says everything twice."""

    def call(nbytes: int) -> None:
        for _ in range(2):
            with contextlib.suppress(ValueError):
                arrived(nbytes)

    return arrived and call


@pytest.mark.parametrize("way", [_never, _deaf])
async def test_however_a_storage_tells_what_has_arrived_it_is_verified(
    root: Path, way: Callable[[Any], Any]
) -> None:
    state = make_state()
    async with faulty_storage(root) as storage, CheckpointEngine(_Custom(storage, way)) as engine:
        info = await (await engine.save(state)).upload_completion
        assert_same(await engine.read(info), state)
        (file,) = data_files(root / info.checkpoint_id)
        begin, _ = (await items_of(info))["m.big1"]
        flip(file, begin + 70_000)
        file.read_bytes()  # so that the page cache holds it
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load(target_of(state), info)
        assert "m.big1" in caught.value.tensors


async def test_every_single_bit_of_a_small_checkpoint_counts(root: Path) -> None:
    state = {"a": torch.arange(5, dtype=torch.uint8), "n": 7}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save(state)).upload_completion
        begin, end = (await items_of(info))["a"]
        (file,) = data_files(root / info.checkpoint_id)
        for position in range(begin, end, 3):
            for mask in (1, 128):
                flip(file, position, mask)
                with pytest.raises(CorruptCheckpointError) as caught:
                    await engine.load({"a": torch.zeros(5, dtype=torch.uint8)}, info)
                assert "a" in caught.value.tensors
                flip(file, position, mask)


async def test_a_flip_outside_the_wanted_blocks_does_not_matter(root: Path) -> None:
    wanted = random_tensor(torch.uint8, (2 * BLOCK_BYTES,), 1)
    other = random_tensor(torch.uint8, (8 * BLOCK_BYTES,), 2)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save({"wanted": {"x": wanted}, "other": {"x": other}})).upload_completion
        items = await items_of(info)
        begin, end = items["other.x"]
        (file,) = data_files(root / info.checkpoint_id)
        flip(file, (begin + end) // 2)
        assert_same(await engine.read(info, keys=["wanted"]), {"wanted": {"x": wanted}})
        target = {"wanted": {"x": torch.zeros_like(wanted)}}
        await engine.load(target, info)
        assert_same(target, {"wanted": {"x": wanted}})
        with pytest.raises(CorruptCheckpointError):
            await engine.read(info)


async def test_a_flip_anywhere_in_manifest_or_metadata_is_noticed(root: Path) -> None:
    state = {"m": {"w": random_tensor(torch.float32, (30, 40), 1), "n": [1, 2]}}
    chosen = random.Random(3)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save(state, notes={"k": "v"})).upload_completion
        directory = root / info.checkpoint_id
        for path in (directory / ".metadata", manifest_file(directory)):
            size = path.stat().st_size
            for position in [0, size - 1, *(chosen.randrange(size) for _ in range(60))]:
                flip(path, position)
                target = {"m": {"w": torch.zeros(30, 40), "n": None}}
                with pytest.raises(CorruptCheckpointError):
                    await engine.load(target, info.checkpoint_id)
                assert_same(target, {"m": {"w": torch.zeros(30, 40), "n": None}})
                flip(path, position)
        assert_same(await engine.read(info.checkpoint_id), state)


async def test_zeroed_pages_are_noticed(root: Path) -> None:
    """What a file system may give back after a power cut: the right length, and nothing in it."""
    state = {f"t{i}": random_tensor(torch.uint8, (BLOCK_BYTES,), i) for i in range(6)}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        info = await (await engine.save(state)).upload_completion
        (file,) = data_files(root / info.checkpoint_id)
        content = file.read_bytes()
        for page in random.Random(1).sample(range(len(content) // 4096), 20):
            damaged = content[: page * 4096] + bytes(4096) + content[(page + 1) * 4096 :]
            file.write_bytes(damaged)
            if damaged != content:
                try:
                    result = await engine.read(info)
                except CorruptCheckpointError:
                    continue
                assert_same(result, state)
                assert page == len(content) // 4096 - 1
        file.write_bytes(bytes(len(content)))
        with pytest.raises(CorruptCheckpointError):
            await engine.read(info)
