"""A call that one rank alone gets wrong is an error on all of them, at once, and the next one works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.engine_agent import EngineAgent
from tests.distributed.harness import NEVER, World
from tests.support.doubles import committed

WRONG: list[dict[str, Any]] = [{"step": -1}, {"step": 1 << 63}, {"name": "a\nb"}, {"name": ".hidden"}]


@pytest.mark.parametrize("which", [0, 1], ids=["the coordinator", "another rank"])
def test_a_refused_call_of_one_rank_fails_that_of_the_others(tmp_path: Path, which: int) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=EngineAgent) as world:
        opened = world.all("engine", root=str(root), coordination=NEVER)
        assert [each["kind"] for each in opened] == ["open", "open"]
        world.all("fill", value=1)
        for number, wrong in enumerate(WRONG, 1):
            calls = [
                world.members[rank].start("save", **(wrong if rank == which else {"step": number}))
                for rank in range(2)
            ]
            outcomes = [call.result() for call in calls]
            assert outcomes[which]["kind"] == "ValueError"
            assert outcomes[1 - which]["kind"] == "SaveError"
            assert "refused" in outcomes[1 - which]["text"]
        both = [member.start("save", step=-5) for member in world.members]
        assert [call.result()["kind"] for call in both] == ["ValueError", "ValueError"]
        world.all("fill", value=9)
        good = [member.start("save", step=9) for member in world.members]
        assert [call.result()["kind"] for call in good] == ["committed", "committed"]
        world.all("end")
    assert committed(root) == ["step-00000009"]
