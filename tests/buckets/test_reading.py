"""Reads from a bucket: which bytes are asked for, and what becomes of answers that are not what was asked."""

from __future__ import annotations

import re
from typing import Any

import obstore
import pytest
import torch

from dcp_async import CheckpointEngine, CorruptCheckpointError
from dcp_async._names import METADATA, manifest_file
from dcp_async.errors import StorageError
from dcp_async.storage import Listing
from dcp_async.storage.object_store.reader import requests_for
from dcp_async.testing.saves import CONTENT, FIRST, NAME, committed, file_of, opened, read, save
from tests.support.buckets import Fault, Server, proxy_to

MIB = 1 << 20


def asked(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    buffers = [(offset, memoryview(bytearray(nbytes))) for offset, nbytes in pieces]
    requests = list(requests_for(buffers))
    assert sum(len(buffer) for request in requests for _, buffer in request.pieces) == sum(
        n for _, n in pieces
    )
    for request in requests:
        assert all(request.start <= o and o + len(b) <= request.stop for o, b in request.pieces)
    return [(request.start, request.stop) for request in requests]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([(7, 0)], []),
        ([(10, 5), (15, 5), (0, 4)], [(0, 20)]),  # close together, in whatever order
        ([(0, 10), (MIB, 10)], [(0, 10), (MIB, MIB + 10)]),  # far apart
        ([(0, 20 * MIB)], [(0, 8 * MIB), (8 * MIB, 16 * MIB), (16 * MIB, 20 * MIB)]),
        ([(0, 5 * MIB), (5 * MIB, 5 * MIB)], [(0, 5 * MIB), (5 * MIB, 10 * MIB)]),
        ([(0, 10), (4, 2), (8, 4)], [(0, 12)]),  # overlapping
    ],
)
def test_pieces_that_lie_close_are_one_request_and_long_ones_several(
    pieces: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert asked(pieces) == expected


@pytest.mark.parametrize("kind", ["status", "reset", "lost answer", "truncate"])
async def test_a_read_that_breaks_off_is_made_again(moto: Server, prefix: str, kind: Any) -> None:
    await save(moto.storage(prefix), NAME, FIRST)
    async with proxy_to(moto) as proxy:
        faults = iter([Fault(kind), Fault(kind)])
        proxy.fault = lambda line: next(faults, None) if line.startswith("GET") and FIRST in line else None
        async with opened(proxy.server.storage(prefix), NAME) as reader:
            assert await read(reader, file_of(FIRST)) == CONTENT
        assert next(faults, None) is None


async def test_a_listing_that_breaks_off_is_made_again(moto: Server, prefix: str) -> None:
    await save(moto.storage(prefix), NAME, FIRST)
    async with proxy_to(moto) as proxy:
        faults = iter([Fault("truncate")])
        proxy.fault = lambda line: next(faults, None) if "list-type" in line else None
        assert await committed(proxy.server.storage(prefix)) == {NAME}
        faults = iter([Fault("truncate")])
        async with opened(proxy.server.storage(prefix), NAME) as reader:
            assert len(await reader.manifest()) == 1
    assert next(faults, None) is None


async def test_a_read_that_always_breaks_off_fails_by_name(moto: Server, prefix: str) -> None:
    await save(moto.storage(prefix), NAME, FIRST)
    async with proxy_to(moto) as proxy:
        proxy.fault = lambda line: Fault("truncate") if line.startswith("GET") and FIRST in line else None
        async with opened(proxy.server.storage(prefix), NAME) as reader:
            with pytest.raises(StorageError, match=rf"cannot read s3://.*{file_of(FIRST)}"):
                await read(reader, file_of(FIRST))


async def test_what_lies_beside_a_checkpoint_is_named_by_its_reader(moto: Server, prefix: str) -> None:
    await save(moto.storage(prefix), NAME, FIRST)
    for file in ("README.md", "folder/deeper.txt"):
        obstore.put(moto.store(), f"{prefix}/{NAME}/{file}", b"somebody's")
    async with opened(moto.storage(prefix), NAME) as reader:
        assert isinstance(reader, Listing)
        files = {METADATA, file_of(FIRST), manifest_file(FIRST), "README.md", "folder"}
        assert set(await reader.names()) == files


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((3 * MIB,), value), "b": torch.arange(1000) * int(value), "step": int(value)}


async def test_a_bit_that_flips_on_the_way_is_noticed(moto: Server, prefix: str) -> None:
    async with CheckpointEngine(moto.storage(prefix)) as engine:
        await (await engine.save(state_of(2.0), step=1)).upload_completion
    async with proxy_to(moto) as proxy:
        proxy.fault = lambda line: Fault("flip") if ".distcp" in line and line.startswith("GET") else None
        async with CheckpointEngine(proxy.server.storage(prefix)) as engine:
            with pytest.raises(CorruptCheckpointError):
                await engine.load(state_of(0.0))


async def test_one_tensor_costs_its_bytes_and_little_more(moto: Server, prefix: str) -> None:
    async with CheckpointEngine(moto.storage(prefix)) as engine:
        await (await engine.save(state_of(2.0), step=1)).upload_completion
    async with proxy_to(moto) as proxy:
        async with CheckpointEngine(proxy.server.storage(prefix)) as engine:
            target = {"b": torch.zeros(1000, dtype=torch.int64)}
            proxy.sent_bytes = 0
            await engine.load(target, strict=False)
            assert torch.equal(target["b"], state_of(2.0)["b"])
            assert proxy.sent_bytes < target["b"].nbytes + MIB
        # the name's .metadata, its listing and manifest; then ranges of its file
        assert len([line for line in proxy.seen if re.match(r"GET .*\.distcp ", line)]) <= 4
