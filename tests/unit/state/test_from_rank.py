"""What is FromRank is one rank's, and no reason to go over a state anew that kept its structure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_async import FromRank
from dcp_async.state import CaptureError, KnownStructure, capture


class Counting:
    def __init__(self) -> None:
        self.num_asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_asked += 1
        return {"t": torch.ones(2), "n": self.num_asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing is loaded")


def make_state(source: int) -> dict[str, Any]:
    return {
        "w": torch.arange(4.0),
        "count": FromRank(1, source),
        "deep": [torch.ones(1), FromRank({"t": torch.ones(3), "n": 1}, source)],
        "object": FromRank(Counting(), source),
        "v": torch.zeros(2),
    }


def names_of(known: KnownStructure) -> list[str]:
    return sorted([*known.structure.tensor_names, *known.structure.leaf_names])


def test_each_rank_holds_its_own_alone() -> None:
    state = make_state(1)
    theirs = capture(state, None, rank=0, world_size=2).known
    assert names_of(theirs) == ["deep.0", "v", "w"]
    assert state["object"].value.num_asked == 0
    mine = capture(state, None, rank=1, world_size=2).known
    assert names_of(mine) == ["count", "deep.0", "deep.1.n", "deep.1.t", "object.n", "object.t", "v", "w"]
    assert state["object"].value.num_asked == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_that_kept_its_structure_is_not_gone_over_anew(rank: int) -> None:
    state = make_state(1)
    known = capture(state, None, rank=rank, world_size=2).known
    state["count"].value = 17
    state["deep"][1].value["t"] = torch.full((3,), 5.0)
    hit = known.cache.look_up(state, {})
    assert hit is not None
    assert state["object"].value.num_asked == 2 * rank
    fresh = capture(state, None, rank=rank, world_size=2)
    assert len(hit.tensors) == len(fresh.tensors)
    assert all(torch.equal(one, other) for one, other in zip(hit.tensors, fresh.tensors, strict=True))
    assert hit.leaves == ([17, 1, 2] if rank == 1 else [])


def another_rank(state: dict[str, Any]) -> None:
    state["count"].rank = 0


def another_key(state: dict[str, Any]) -> None:
    state["deep"][1].value["more"] = 1


def another_kind(state: dict[str, Any]) -> None:
    state["count"].value = {"a": 1}


def another_shape(state: dict[str, Any]) -> None:
    state["deep"][1].value["t"] = torch.ones(4)


def no_mark(state: dict[str, Any]) -> None:
    state["count"] = state["count"].value


@pytest.mark.parametrize("change", [another_rank, another_key, another_kind, another_shape, no_mark])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_another_structure_is_found_out(rank: int, change: Callable[[dict[str, Any]], None]) -> None:
    state = make_state(1)
    known = capture(state, None, rank=rank, world_size=2).known
    change(state)
    # what another rank has is nobody's business here
    is_seen = rank == 1 or change in (another_rank, no_mark)
    assert (known.cache.look_up(state, {}) is None) is is_seen


def test_what_ranks_hold_together_is_refused(mesh: DeviceMesh) -> None:
    tensor = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    with pytest.raises(CaptureError, match=r"a\.b: ranks hold a DTensor together, and FromRank"):
        capture({"a": FromRank({"b": tensor})}, None)
