"""Leaves that outgrow their rooms on some ranks and not on others: all plan anew together, and no value is
lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcp_async import PerRank
from tests.distributed.harness import World
from tests.distributed.replica_agent import ReplicaAgent

REUSED, PLANNED = (2, 2), (4, 4)
"""Messages of a save: sent, received."""

SAVES = [
    ((0, 0), PLANNED),
    ((0, 0), REUSED),
    ((0, 20_000), PLANNED),  # on the rank that only follows
    ((0, 3), REUSED),
    ((30_000, 3), PLANNED),  # on the coordinator alone
    ((5, 60_000), PLANNED),  # shrinks on one, grows on the other
    ((30_000, 60_000), REUSED),
    ((90_000, 90_000), PLANNED),
    ((1, 1), REUSED),
]
"""Length of a leaf on each rank, and what the save costs."""


class GrowingAgent(ReplicaAgent):
    async def put(self, step: int, length: int, common: int) -> None:
        """Leaves of a length: one of a name that only this rank has, one in a PerRank, one that all share."""
        self._state[f"only{self._rank}"] = f"{step}" * length
        self._state["mine"] = PerRank(f"{step}{self._rank}" * length)
        self._state["common"] = f"{step}" * common

    async def found(self) -> list[Any]:
        return [self._state[f"only{self._rank}"], self._state["mine"].value, self._state["common"]]


@pytest.mark.parametrize("overlap", [False, True])
def test_no_value_is_lost_where_one_ranks_leaf_outgrew_its_room(tmp_path: Path, overlap: bool) -> None:
    with World(2, tmp_path, kind=GrowingAgent) as world:
        assert world.all("engine", root=str(tmp_path / "root"), overlap=overlap) == [{"kind": "open"}] * 2
        world.all("fill", value=1)
        for step, (lengths, cost) in enumerate(SAVES):
            for rank, length in enumerate(lengths):
                world[rank].do("put", step=step, length=length, common=lengths[0] // 2)
            before = world.all("messages")
            assert [each["kind"] for each in world.all("save", step=step)] == ["committed"] * 2
            after = world.all("messages")
            assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)] == [cost] * 2
        for step, (lengths, _) in enumerate(SAVES):
            assert [each["kind"] for each in world.all("load", source=step)] == ["loaded"] * 2
            for rank, length in enumerate(lengths):
                assert world[rank].do("found") == [
                    f"{step}" * length,
                    f"{step}{rank}" * length,
                    f"{step}" * (lengths[0] // 2),
                ]
        world.all("end")
