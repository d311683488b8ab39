"""Whoever fails, every rank raises the same error: its class, its words, its phase, all failures in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_async.sync import CheckpointEngine
from tests.distributed.engine_agent import Outcome
from tests.distributed.harness import World
from tests.distributed.replica_agent import ReplicaAgent
from tests.support.doubles import data_files, flip

SIZE = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World(SIZE, tmp_path_factory.mktemp("three"), kind=ReplicaAgent) as made:
        yield made


@pytest.fixture
def job(world: World, root: Path) -> Iterator[World]:
    found = world.all("engine", root=str(root))
    assert {each["kind"] for each in found} == {"open"}, found
    yield world
    world.all("heal")
    world.all("abort")


def saved(world: World, step: int, **arguments: Any) -> list[Outcome]:
    world.all("fill", value=step)
    return world.all("save", step=step, **arguments)


def assert_same(outcomes: Sequence[Outcome], *parts: str) -> None:
    """But for how a rank's own exception prints."""
    for part in ("kind", "text", "phase", *parts):
        assert len({str(each.get(part)) for each in outcomes}) == 1, (part, outcomes)
    assert len({tuple(each["failures"]) for each in outcomes}) == 1, outcomes


FAILING = [
    # (rank, where, what) of two, the phase of the lower one, what is told of each
    ((0, "put", "disk"), (2, "put", "memory"), "write", ("No space left", "cannot allocate")),
    ((1, "put", "unpicklable"), (2, "put", "disk"), "write", ("only here", "No space left")),
    ((1, "seal", "disk"), (2, "put", "memory"), "write", ("No space left", "cannot allocate")),
    ((0, "stage", "memory"), (1, "put", "disk"), "stage", ("cannot allocate",)),
    ((0, "capture", "disk"), (2, "capture", "memory"), "capture", ("No space left", "cannot allocate")),
    ((1, "capture", "unpicklable"), (2, "capture", "disk"), "capture", ("only here", "No space left")),
]


@pytest.mark.parametrize(("first", "second", "phase", "told"), FAILING)
def test_a_save_that_fails_on_two_ranks_fails_alike_on_all(
    job: World, first: Any, second: Any, phase: str, told: tuple[str, ...]
) -> None:
    assert {each["kind"] for each in saved(job, 1)} == {"committed"}
    for rank, where, what in (first, second):
        if where in ("stage", "capture"):
            job[rank].do("fail_in", point=where, failure=what)
        else:
            job[rank].do("fail_verb", at=where, failure=what)
    outcomes = saved(job, 2)
    assert_same(outcomes)
    assert outcomes[0]["kind"] == "SaveError"
    known = list(outcomes[0]["failures"])
    assert known  # who is stopped before its own fault comes up, or comes too late, tells of none
    assert set(known) <= {first[0], second[0]}
    if known[0] == first[0]:
        assert outcomes[0]["phase"] == phase
    for text, (rank, *_) in zip(told, (first, second), strict=False):
        assert rank not in known or text in outcomes[0]["text"], outcomes
    job.all("heal")
    assert {each["kind"] for each in saved(job, 3)} == {"committed"}


def test_a_name_that_is_taken_says_on_all_ranks_what_to_do(job: World) -> None:
    saved(job, 1)
    outcomes = saved(job, 1)
    assert_same(outcomes)
    assert outcomes[0]["kind"] == "CheckpointExistsError"
    assert all("replace=True" in each["text"] for each in outcomes)


def test_ranks_that_save_different_leaves_say_the_same(job: World) -> None:
    job.all("fill", value=1)
    job[1].do("edit", what="count", value=5)
    outcomes = job.all("save", step=1)
    assert_same(outcomes)
    assert "count differs" in outcomes[2]["text"]


@pytest.mark.parametrize("ranks", [[0], [1, 2]], ids=str)
@pytest.mark.parametrize("verb", ["read_into", "size", "open"])
def test_a_read_error_is_a_load_error_on_all_ranks(job: World, ranks: list[int], verb: str) -> None:
    saved(job, 1)
    for rank in ranks:
        job[rank].do("fail_verb", at=verb, failure="unreadable", times=float("inf"))
    outcomes = job.all("load_fully", source=1)
    assert_same(outcomes, "checkpoint_id")
    assert outcomes[0]["kind"] == "LoadError", outcomes
    # who would fail later may have heard of another's failure before
    assert any("OSError" in outcomes[rank]["causes"] for rank in ranks), outcomes
    assert "Input/output error" in outcomes[0]["text"]


def test_a_corrupt_block_names_its_tensors_on_all_ranks(job: World, root: Path) -> None:
    saved(job, 1)
    with CheckpointEngine(root) as engine:
        raw = engine.read(1)["own"]["rank_1"]["noise"].numpy().tobytes()
    (path,) = (path for path in data_files(root / "step-00000001") if path.name.startswith("__1_"))
    flip(path, path.read_bytes().index(raw) + len(raw) // 2)
    outcomes = job.all("load_fully", source=1)
    assert_same(outcomes, "checkpoint_id", "tensors", "partially_loaded")
    assert outcomes[0]["kind"] == "CorruptCheckpointError"
    assert "own.rank_1.noise" in outcomes[0]["tensors"]
    assert outcomes[0]["partially_loaded"] is True
    assert outcomes[0]["checkpoint_id"] == "step-00000001"


def test_what_a_trust_refuses_says_on_all_ranks_how_to_allow_it(world: World, root: Path) -> None:
    assert {each["kind"] for each in world.all("engine", root=str(root), unsafe=True)} == {"open"}
    world.all("fill", value=1, foreign=True)
    assert {each["kind"] for each in world.all("save", step=1)} == {"committed"}
    world.all("abort")
    calls = [world[rank].start("engine", root=str(root), unsafe=rank != 2) for rank in range(SIZE)]
    assert {call.result()["kind"] for call in calls} == {"open"}
    world.all("fill", value=2, foreign=True)
    outcomes = world.all("load_fully")
    assert_same(outcomes, "checkpoint_id")
    assert outcomes[0]["kind"] == "UntrustedCheckpointError"
    assert all("Trust(safe_globals=(Foreign,))" in each["text"] for each in outcomes), outcomes
    world.all("abort")


def test_a_checkpoint_that_is_not_there_is_missed_alike(job: World) -> None:
    saved(job, 1)
    outcomes = job.all("load_fully", source=7)
    assert_same(outcomes)
    assert outcomes[0]["kind"] == "CheckpointNotFoundError"


@pytest.mark.parametrize("ranks", [[0], [1, 2], [0, 1, 2]], ids=str)
def test_states_that_refuse_what_was_read_are_told_alike(job: World, ranks: list[int]) -> None:
    job.all("fill", value=1)
    job.all("refuse_what_is_loaded")
    assert {each["kind"] for each in job.all("save", step=1)} == {"committed"}
    for rank in set(range(SIZE)) - set(ranks):
        job[rank].do("accept_what_is_loaded")
    outcomes = job.all("load_fully")
    assert_same(outcomes, "checkpoint_id")
    assert outcomes[0]["kind"] == "LoadError"
    assert "KeyError" in outcomes[0]["text"]


@pytest.mark.parametrize("ranks", [[1], [0, 2]], ids=str)
def test_states_that_do_not_fit_are_told_alike(job: World, ranks: list[int]) -> None:
    saved(job, 1)
    for rank in ranks:
        job[rank].do("edit", what=f"model.more{rank}", value=1.0)
    outcomes = job.all("load_fully")
    assert_same(outcomes, "checkpoint_id")
    assert outcomes[0]["kind"] == "IncompatibleStateError"
    # who is told to stop before it has compared its state tells of none
    assert any(f"model.more{rank}" in outcomes[0]["text"] for rank in ranks), outcomes
