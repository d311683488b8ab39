"""Engines on a bucket: by a URL, by several ranks, beside stock's reader and writer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import fsspec
import obstore
import pytest
import torch
import torch.distributed.checkpoint as dcp
from obstore.fsspec import FsspecStore
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import dcp_async
from dcp_async import CheckpointEngine, CheckpointExistsError, SaveCancelled, StagingOptions
from tests.support.buckets import BUCKET, KEYS, Fault, Server, proxy_to

MIB = 1 << 20


def state_of(value: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3 * MIB,), float(value)), "b": torch.arange(7) + value},
        "step": value,
        "names": ["a", "b"],
    }


def check(state: dict[str, Any], value: int) -> None:
    assert torch.equal(state["model"]["w"], torch.full((3 * MIB,), float(value)))
    assert torch.equal(state["model"]["b"], torch.arange(7) + value)
    assert state["step"] == value


@pytest.fixture
def url(seaweed: Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A root that says nothing of the server: what tools of the cloud read says it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    for name, value in KEYS.items():
        monkeypatch.setenv(f"AWS_{name.upper()}", str(value))
    return f"s3://{BUCKET}/{prefix}"


async def test_a_run_goes_on_in_a_bucket_as_it_does_in_a_directory(url: str) -> None:
    # slots of 8 MiB: of 12 there is one part that is sent as it is, and a rest
    async with CheckpointEngine(url, staging=StagingOptions(part_bytes=8 * MIB)) as engine:
        assert await engine.latest() is None
        for step in (1, 2):
            await (await engine.save(state_of(step), step=step)).upload_completion
        with pytest.raises(CheckpointExistsError):
            await (await engine.save(state_of(3), step=2)).upload_completion
        await (await engine.save(state_of(4), step=2, replace=True)).upload_completion
    async with CheckpointEngine(url) as engine:
        state = state_of(0)
        assert (await engine.load(state)).step == 2
        check(state, 4)
        await engine.load(state, 1)
        check(state, 1)
        report = await engine.verify("latest")
        assert report.damage == ()


async def test_a_checkpoint_in_a_bucket_is_opened_by_its_url(url: str) -> None:
    async with CheckpointEngine(url) as engine:
        await (await engine.save(state_of(3), checkpoint_id="best")).upload_completion
    async with dcp_async.open_checkpoint(f"{url}/best") as checkpoint:
        assert torch.equal(await checkpoint.tensor("model.b"), torch.arange(7) + 3)


async def test_a_cancelled_save_leaves_nothing_in_the_bucket(moto: Server, prefix: str) -> None:
    async with proxy_to(moto) as proxy:
        gate = asyncio.Event()
        proxy.fault = lambda line: Fault("hold", until=gate) if "partNumber=" in line else None
        async with CheckpointEngine(
            proxy.server.storage(prefix), staging=StagingOptions(part_bytes=8 * MIB)
        ) as engine:
            response = await engine.save(state_of(1), step=1)
            await proxy.until("partNumber=")
            response.cancel()
            gate.set()
            with pytest.raises(SaveCancelled):
                await response.upload_completion
    assert moto.open_uploads(prefix) == moto.keys(prefix) == []


# -- stock


@pytest.fixture
def stock(seaweed: Server) -> str:
    """A scheme by which stock reaches the bucket, through fsspec."""

    class Store(FsspecStore):
        protocol = "s3"

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["config"] = {**KEYS, "endpoint": seaweed.endpoint}
            super().__init__("s3", *args, client_options={"allow_http": True}, **kwargs)

    fsspec.register_implementation("s3", Store, clobber=True)
    return f"s3://{BUCKET}"


async def test_stock_reads_what_we_wrote_to_a_bucket(seaweed: Server, prefix: str, stock: str) -> None:
    async with CheckpointEngine(seaweed.storage(prefix)) as engine:
        await (await engine.save(state_of(5), checkpoint_id="ours")).upload_completion
    target = state_of(0)
    dcp.load(target, storage_reader=FsspecReader(f"{stock}/{prefix}/ours"))
    check(target, 5)


async def test_what_stock_wrote_for_a_bucket_is_read(seaweed: Server, prefix: str, tmp_path: Path) -> None:
    # on a disk first, then up: through obstore's fsspec (0.12) stock writes what it can't read itself
    dcp.save(state_of(6), storage_writer=FsspecWriter(f"file://{tmp_path}/theirs"))
    for file in (tmp_path / "theirs").iterdir():
        obstore.put(seaweed.store(), f"{prefix}/theirs/{file.name}", file)
    async with CheckpointEngine(seaweed.storage(prefix)) as engine:
        state = state_of(0)
        await engine.load(state, "theirs")
        check(state, 6)
