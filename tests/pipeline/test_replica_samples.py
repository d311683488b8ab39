"""What is read of a state to be compared with other ranks: what the turn says, and nothing that was changed
or freed behind a save with overlap=True."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dcp_async.planning.planner import CompiledPlan
from dcp_async.planning.replica_turns import Turn
from dcp_async.save.replica_check import Mode, ReplicaCheck, Sample
from dcp_async.staging.stager import Stager, StagingOptions
from dcp_async.staging.watch.mutation_watch import MutatedTensors
from dcp_async.state.capture import Captured, capture

FIRST = Turn(number=0, is_proven=False)
PROVEN = Turn(number=1, is_proven=True)


def plan_of(captured: Captured, *, blocks: int = 4) -> CompiledPlan:
    """All of its tensors are held by other ranks as well."""
    count = len(captured.tensors)
    group = {"number": 0, "blocks": blocks, "meshes": [], "runs": [(0, count)]}
    return cast(CompiledPlan, SimpleNamespace(structure=captured.structure, replicas=[group]))


def some_state() -> dict[str, torch.Tensor]:
    return {
        "large": torch.ones(1 << 22),
        "medium": torch.ones(30_000),
        "strided": torch.ones(300, 200).t(),
        **{f"small{at}": torch.ones(40) for at in range(5)},
    }


@pytest.fixture
async def stager() -> AsyncIterator[Stager]:
    async with Stager(StagingOptions(overlap=True)) as made:
        yield made


def set_data(tensor: torch.Tensor) -> None:
    tensor.data = torch.full(tuple(tensor.shape), 2.0)


def set_unseen(tensor: torch.Tensor) -> None:
    tensor.data.fill_(2.0)


def free(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def shrink(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(64)


def cut(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:1]


CHANGES: list[Callable[[torch.Tensor], object]] = [
    torch.Tensor.zero_,
    set_data,
    set_unseen,
    free,
    shrink,
    cut,
]


@pytest.mark.parametrize("vectored", [True, False])
@pytest.mark.parametrize("turn", [FIRST, PROVEN], ids=["first", "proven"])
@pytest.mark.parametrize("name", ["large", "medium", "strided"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
async def test_what_was_changed_meanwhile_is_no_difference_between_ranks(
    stager: Stager, change: Callable[[torch.Tensor], object], name: str, turn: Turn, vectored: bool
) -> None:
    state = some_state()
    if change is set_unseen and name == "strided":
        pytest.skip("bytes are sampled of what is row-major")
    if change is cut and name != "strided" and vectored:
        pytest.skip("the memory that was captured is still there, and read")
    captured = capture(state, None)
    stager.copier.has_vectored_copy = vectored and sys.platform == "linux"
    prepared = stager.prepare(captured)
    change(state[name])
    # all blocks, so that the tensor is among what this turn reads
    with pytest.raises(MutatedTensors, match=name):
        ReplicaCheck("check", stager).take(plan_of(captured, blocks=1000), prepared, turn)
    assert stager.copier.has_vectored_copy == (vectored and sys.platform == "linux")


async def test_what_was_copied_aside_may_change(stager: Stager) -> None:
    state = {f"small{at}": torch.ones(40) for at in range(5)}
    captured = capture(state, None)
    prepared = stager.prepare(captured)
    for tensor in state.values():
        set_data(tensor)
    sample = ReplicaCheck("check", stager).take(plan_of(captured), prepared, PROVEN)
    assert sample is not None
    other = capture({name: torch.ones(40) for name in state}, captured.known)
    again = ReplicaCheck("check", stager).take(plan_of(captured), stager.prepare(other), PROVEN)
    assert again is not None
    assert sample.digests() == again.digests()


def kinds_of(sample: Sample | None) -> list[str]:
    assert sample is not None
    return sorted(kind for _, kind, _ in sample.digests())


@pytest.mark.parametrize(
    ("mode", "turn", "kinds"),
    [
        ("check", FIRST, ["small", "whole"]),
        ("check", PROVEN, ["blocks", "small"]),
        ("sample", FIRST, ["blocks"]),
        ("sample", PROVEN, ["blocks"]),
        ("trust", FIRST, []),
    ],
)
async def test_ranks_read_what_the_turn_says_whatever_they_have_saved_before(
    stager: Stager, mode: Mode, turn: Turn, kinds: list[str]
) -> None:
    """With several saves pending, one rank may have heard of a commit that another has not."""
    captured = capture(some_state(), None)
    prepared = stager.prepare(captured)
    plan = plan_of(captured)
    fresh, used = ReplicaCheck(mode, stager), ReplicaCheck(mode, stager)
    for before in (FIRST, PROVEN):
        used.take(plan, prepared, before)
    there, here = fresh.take(plan, prepared, turn), used.take(plan, prepared, turn)
    assert kinds_of(there) == kinds_of(here) == kinds
    assert there is not None
    assert here is not None
    assert there.digests() == here.digests()


@pytest.mark.parametrize("overlap", [False, True])
async def test_later_samples_of_many_tensors_take_no_step_of_python_each(overlap: bool) -> None:
    instructions = 0

    def count(frame: Any, _event: str, _argument: Any) -> Any:
        nonlocal instructions
        frame.f_trace_opcodes = True  # a comprehension is a line
        instructions += 1
        return count

    steps = []
    for number in (500, 4000):
        state = {f"w{at}": torch.ones(64) for at in range(number)}
        async with Stager(StagingOptions(overlap=overlap)) as made:
            check, plan, previous = ReplicaCheck("check", made), None, None
            for _ in range(4):
                captured = capture(state, previous)
                previous = captured.known
                plan = plan or plan_of(captured)
                prepared = made.prepare(captured)
                instructions = 0
                before = sys.gettrace()
                sys.settrace(count)
                try:
                    sample = check.take(plan, prepared, PROVEN)
                finally:
                    sys.settrace(before)
                assert sample is not None
                sample.release()
            steps.append(instructions)
    assert steps[1] < steps[0] + 500, steps
