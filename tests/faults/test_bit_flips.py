"""A single bit that flips anywhere in a checkpoint of ours is told, with its block and all names in it.

Twenty times `--kills` flips in all, over data files, `.metadata` and manifest; each is undone after it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, verify
from tests.support.doubles import data_files, flip, manifest_file

BLOCK = 64 << 10
PLACES = ("payload", "footer", "metadata", "manifest", "zeros")


def make_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(300, 200, generator=generator),
        "large": torch.randn(1 << 19, generator=generator),
        "many": {str(number): torch.full((3,), float(number)) for number in range(50)},
        "sparse": torch.eye(5).to_sparse(),
        "epoch": 3,
    }


async def test_each_flipped_bit_is_told(root: Path, kills: int) -> None:
    async with CheckpointEngine(root) as engine:
        await engine.save(make_state(), step=1)
    path = root / "step-00000001"
    (file,) = data_files(path)
    stored = dcp.FileSystemReader(path).read_metadata().storage_data.items()
    items = [(index.fqn, info.offset, info.offset + info.length) for index, info in stored]
    image, size = (await verify(path)).nbytes, file.stat().st_size
    table = image + 8 * -(-image // BLOCK)
    chosen, told = random.Random(kills), dict.fromkeys(PLACES, 0)
    ranges = {
        "payload": (file, 0, image),
        "footer": (file, image, table),
        "zeros": (file, table, size - 40),
        "metadata": (path / ".metadata", 0, (path / ".metadata").stat().st_size),
        "manifest": (manifest_file(path), 0, manifest_file(path).stat().st_size),
    }
    for number in range(20 * kills):
        # most of the bytes are payload: each kind of place has its share
        place = list(ranges)[number % len(ranges)]
        target, start, stop = ranges[place]
        position, mask = chosen.randrange(start, stop), 1 << chosen.randrange(8)
        flip(target, position, mask)
        report = await verify(path)
        flip(target, position, mask)
        told[place] += 1
        if place == "zeros":  # between the table and the trailer: padding, whatever it holds
            assert report.ok
            continue
        (damage,) = report.damage
        assert damage.file == target.name
        assert damage.start <= position < damage.stop
        if place == "footer":  # without it, nothing tells which of its blocks are whole
            assert set(damage.names) == {name for name, *_ in items}
        elif place == "payload":
            block = position // BLOCK * BLOCK
            assert (damage.start, damage.stop) == (block, min(block + BLOCK, image))
            inside = {name for name, first, end in items if first < damage.stop and end > damage.start}
            assert set(damage.names) == inside
    assert (await verify(path)).ok
    assert min(told[place] for place in ranges) >= 4 * kills
