"""Memory that only one process sees is refused to several ranks, before any of them waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dcp_async import CheckpointEngine, Coordination, StorageError
from dcp_async.storage import MemoryStorage
from tests.distributed.engine_agent import EngineAgent, Outcome, described
from tests.distributed.harness import World


class MemoryAgent(EngineAgent):
    async def memory(self, given: bool, mode: Any) -> Outcome:
        """Open an engine on memory, by URL or on a storage that is given, and save to it."""
        storage = MemoryStorage("run")
        try:
            engine = CheckpointEngine(
                storage if given else "memory://run", coordination=Coordination(mode=mode)
            )
            async with engine:
                await engine.save({"rank": self._rank}, step=1)
                return {"kind": (await engine.read())["rank"]}
        except StorageError as error:
            return described(error)
        finally:
            await storage.close()
            MemoryStorage.clear("run")


def test_memory_is_refused_to_ranks_that_save_together(tmp_path: Path) -> None:
    with World(2, tmp_path, kind=MemoryAgent) as world:
        for given in (False, True):
            for outcome in world.all("memory", given=given, mode="auto"):
                assert outcome["kind"] == "StorageError"
                assert "memory of one process, and several ranks" in outcome["text"]
        assert world.all("memory", given=False, mode="local") == [{"kind": 0}, {"kind": 1}]
