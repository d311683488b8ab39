"""What runs in each rank of a world whose saves and loads go through parts of anybody's.

Enters: a root. Leaves: the calls that were made, what was loaded, and how the verbs ended, as plain data.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from dcp_async import CheckpointError, functional
from tests.distributed.agent import Agent
from tests.distributed.planner_agent import blank, state, told


class Writer(FileSystemWriter):
    """Of stock's; raises in one method on one rank."""

    failing: tuple[str, int] = ("", 0)

    def __init__(self, path: str) -> None:
        super().__init__(path, sync_files=False)
        self.calls: list[str] = []

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if self.failing == (name, dist.get_rank()):
            raise OSError(5, f"{name} is torn")

    def set_up_storage_writer(self, *args: Any, **kwargs: Any) -> None:
        self._note("set_up_storage_writer")
        super().set_up_storage_writer(*args, **kwargs)

    def prepare_global_plan(self, plans: Any) -> Any:
        self._note("prepare_global_plan")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._note("write_data")
        return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        self._note("finish")
        super().finish(metadata, results)


class Reader(FileSystemReader):
    """Of stock's; raises when it is to read, on one rank."""

    failing_rank = -1

    def read_data(self, plan: Any, planner: Any) -> Any:
        if self.failing_rank == dist.get_rank():
            raise OSError(5, "read_data is torn")
        return super().read_data(plan, planner)


class StockPartsAgent(Agent):
    """Verbs through parts of stock's."""

    async def through(self, root: str) -> Any:
        """(calls of the writer, what its reader reads, how many names the metadata has)."""
        writer = Writer(f"{root}/a")
        metadata = await functional.save(state(), storage_writer=writer)
        target = blank()
        await functional.load(target, storage_reader=Reader(f"{root}/a"))
        return writer.calls, told(target), len(metadata.state_dict_metadata)

    async def failing(self, root: str, method: str, rank: int) -> str:
        """How a save ends whose writer raises in ``method`` on ``rank``."""
        writer = Writer(f"{root}/{method}-{rank}")
        writer.failing = method, rank
        response = await functional.async_save(state(), storage_writer=writer)
        try:
            await response.upload_completion
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    async def failing_load(self, root: str, rank: int) -> str:
        """How a load ends whose reader raises on ``rank``."""
        reader = Reader(f"{root}/a")
        reader.failing_rank = rank
        try:
            await functional.load(blank(), storage_reader=reader)
        except CheckpointError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"
