"""Every name that torch's page on checkpoints lists works through ours on two ranks, with FSDP2."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.documented_names_agent import NamesAgent
from tests.distributed.harness import World


def test_on_two_ranks(tmp_path: Path) -> None:
    with World(2, tmp_path, kind=NamesAgent) as world:
        assert world.all("go_through", root=str(tmp_path / "run")) == [{}, {}]
