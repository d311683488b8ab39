"""Files that several ranks attach are written once, or refused on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from dcp_async import CheckpointEngine
from dcp_async.errors import CheckpointError
from tests.distributed.engine_agent import EngineAgent, Outcome, described
from tests.distributed.harness import World


class AttachAgent(EngineAgent):
    async def attach(self, root: str, files: list[Mapping[str, bytes]], step: int) -> Outcome:
        """Save with what ``files`` has for this rank; what the checkpoint has then, to this rank."""
        async with CheckpointEngine(root) as engine:
            try:
                state = {"w": torch.arange(4.0), "step": step}
                response = await engine.save(state, step=step, files=files[self._rank])
                info = await response.upload_completion
            except (CheckpointError, ValueError) as error:
                return described(error)
            async with engine.checkpoint(step) as checkpoint:
                read = {name: await checkpoint.file(name) for name in checkpoint.files}
            latest = await engine.latest()
            assert latest is not None
            return {"kind": "committed", "told": dict(info.files), "read": read, "latest": dict(latest.files)}


def test_files_of_several_ranks_are_attached_once_and_other_bytes_refused_on_all(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=AttachAgent) as world:
        files: list[dict[str, bytes]] = [{"config.json": b"{}"}, {"config.json": b"{}", "rank1.log": b"log"}]
        for outcome in world.all("attach", root=str(root), files=files, step=1):
            assert outcome["kind"] == "committed"
            assert outcome["told"] == outcome["latest"] == {"config.json": 2, "rank1.log": 3}
            assert outcome["read"] == {"config.json": b"{}", "rank1.log": b"log"}
        assert (root / "step-00000001" / "rank1.log").read_bytes() == b"log"

        files = [{"config.json": b"{}"}, {"config.json": b"[]"}]
        for outcome in world.all("attach", root=str(root), files=files, step=2):
            assert outcome["kind"] == "SaveError"
            assert "files['config.json'] has 2 bytes on rank 0 and other ones" in outcome["text"]
        assert not (root / "step-00000002").exists()

        for outcome in world.all("attach", root=str(root), files=[{}, {"a": b"1"}], step=3):
            assert outcome["read"] == {"a": b"1"}
        for outcome in world.all("attach", root=str(root), files=[{"../a": b""}, {}], step=4):
            assert outcome["kind"] in ("SaveError", "ValueError")
            assert "no file can be attached under this name" in outcome["text"]
