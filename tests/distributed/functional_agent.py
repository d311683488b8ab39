"""What runs in each rank of a world that calls DCP's functions of ours, awaited.

Enters: a root. Leaves: what was loaded, by us and by stock, and how the calls ended, as plain data.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as stock
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from dcp_async import CheckpointError, functional
from tests.distributed.agent import Agent
from tests.distributed.planner_agent import blank, state, told


class Broken:
    """One rank has no state."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise ValueError("no state")
        return {"n": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("it was never saved")


class FunctionalAgent(Agent):
    """DCP's functions over ranks."""

    async def both_ways(self, root: str) -> Any:
        """(what stock reads of ours, what we read of stock's, how many names the metadata has)."""
        metadata = await functional.save(state(), checkpoint_id=f"{root}/ours")
        theirs = blank()
        stock.load(theirs, checkpoint_id=f"{root}/ours")
        stock.save(state(), storage_writer=FileSystemWriter(Path(root) / "stock", sync_files=False))
        ours = blank()
        await functional.load(ours, storage_reader=FileSystemReader(f"{root}/stock"))
        return told(theirs), told(ours), sorted(metadata.state_dict_metadata)

    async def overlapping(self, root: str) -> Any:
        """Saves of one directory and of others under way at once, beside collectives of the training."""
        responses = [
            await functional.async_save(
                {**state(), "step": number}, checkpoint_id=f"{root}/{name}", no_dist=False
            )
            for number, name in enumerate(("one", "same", "same", "two"))
        ]
        total = torch.ones(3)
        for _ in range(5):
            dist.all_reduce(total)
            await asyncio.sleep(0)
        for response in responses:
            await response.upload_completion
        loaded = []
        for name in ("one", "same", "two"):
            target = blank()
            await functional.load(target, checkpoint_id=f"{root}/{name}")
            loaded.append(told(target))
        return total.tolist(), loaded

    async def kept(self, root: str, leader: int) -> Any:
        """Calls of one Checkpointer, led by another rank."""
        directory = f"{root}/kept"
        writer, reader = FileSystemWriter(directory), FileSystemReader(directory)
        async with functional.Checkpointer(writer, reader, coordinator_rank=leader) as checkpointer:
            for number in range(3):
                await checkpointer.async_save({**state(), "step": number})
            target = blank()
            await checkpointer.load(target)
        return told(target)

    async def failing(self, root: str) -> list[str]:
        """How calls end that fail on one rank."""
        ends = []
        for verb in (functional.save, functional.async_save):
            try:
                await verb({"s": Broken(), **state()}, checkpoint_id=f"{root}/broken")
            except CheckpointError as error:
                ends.append(f"{type(error).__name__}: {error}")
        try:
            rows = blank() if dist.get_rank() == 0 else {**blank(), "absent": torch.zeros(1)}
            await functional.load(rows, checkpoint_id=f"{root}/ours")
        except CheckpointError as error:
            ends.append(f"{type(error).__name__}: {error}")
        return ends

    async def alone(self, root: str) -> Any:
        """Each rank for itself."""
        rank = dist.get_rank()
        await functional.save({"rank": rank}, checkpoint_id=f"{root}/alone{rank}", no_dist=True)
        target = {"rank": -1}
        dist.barrier()  # what rank 0 saves is there
        await functional.load(target, checkpoint_id=f"{root}/alone{1 - rank if rank else 0}", no_dist=True)
        return target["rank"]
