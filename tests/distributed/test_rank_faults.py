"""CheckpointEngine among real processes on gloo: whatever happens to one rank, all end alike, soon, and with
a directory that holds whole checkpoints only."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_async.errors import EngineStateError
from dcp_async.sync import CheckpointEngine
from tests.distributed.engine_agent import EngineAgent, Outcome, whole
from tests.distributed.harness import NEVER, PATIENCE, World
from tests.support.doubles import assert_holds_only, assert_same, committed, data_files, flip, leftovers

SHORT = 2.0
"""Seconds of Timeouts.coordination where a test waits for it to pass."""


def step(number: int) -> str:
    return f"step-{number:08d}"


class Job:
    """A world whose ranks have opened an engine on one root."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root
        self.ranks = range(len(world.members))

    @property
    def size(self) -> int:
        return len(self.ranks)

    def open(self, ranks: Sequence[int] | None = None, **arguments: Any) -> None:
        opened = self.world.all("engine", ranks, root=str(self.root), **arguments)
        assert [each["kind"] for each in opened] == ["open"] * len(opened), opened

    def save(self, number: int, ranks: Sequence[int] | None = None, **arguments: Any) -> list[Outcome]:
        """All save the state of step ``number``."""
        self.world.all("fill", ranks, value=number)
        return [call.result() for call in self.world.begin("save", ranks, step=number, **arguments)]

    def save_well(self, number: int, ranks: Sequence[int] | None = None, **arguments: Any) -> None:
        outcomes = self.save(number, ranks, **arguments)
        assert [each["kind"] for each in outcomes] == ["committed"] * len(outcomes), outcomes

    def end(self, ranks: Sequence[int] | None = None) -> list[Outcome]:
        return self.world.all("end", ranks)


class Shared:
    """One world of a size for many tests, since starting processes takes seconds; a test that fails leaves it
    in an unknown state, so then the next gets a new one."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder, self._size = folder, size
        self._world: World | None = None
        self._clean = False

    @contextlib.contextmanager
    def job(self, root: Path) -> Iterator[Job]:
        if self._world is None or not self._clean:
            self.kill()
            self._world = World(self._size, self._folder, kind=EngineAgent)
        self._clean = False
        yield Job(self._world, root)

    def finished(self) -> None:
        self._clean = True

    def kill(self) -> None:
        if self._world is not None:
            self._world.kill()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("world"), request.param)
    yield made
    made.kill()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("pair"), 2)
    yield made
    made.kill()


MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(tmp_path: Path, root: Path) -> Iterator[MakeJob]:
    """Jobs of processes of their own, for tests that hurt them."""
    with contextlib.ExitStack() as stack:

        def make(size: int, *, host: str = "rank 0") -> Job:
            return Job(stack.enter_context(World(size, tmp_path, host=host, kind=EngineAgent)), root)

        yield make


def end_well(shared: Shared, job: Job) -> None:
    """Close the engines of a world that others use after this test."""
    closed = job.end()
    assert [each["kind"] for each in closed] == ["closed"] * job.size, closed
    shared.finished()


MOST_READ = 50
"""A minute commits a thousand checkpoints; reading them all takes longer than that."""


def assert_whole(root: Path, size: int, numbers: Sequence[int]) -> None:
    """A fresh process that has never met the ranks reads what they committed."""
    assert committed(root) == [step(number) for number in numbers]
    with CheckpointEngine(root) as engine:
        for number in numbers[:: -(-len(numbers) // MOST_READ) or 1]:
            assert_same(engine.read(number), whole(size, number))


def assert_common(outcomes: Sequence[Outcome], rank: int, phase: str, cause: str) -> None:
    """The same SaveError everywhere: it names rank, phase and cause."""
    for outcome in outcomes:
        assert outcome["kind"] == outcomes[0]["kind"], outcomes
        assert outcome["phase"] == phase, outcomes
        assert list(outcome["failures"]) == [rank], outcomes
        assert f"on rank {rank}: " in outcome["text"], outcomes
        assert cause in outcome["text"], outcomes


# (a) One rank fails.

FAULTS = [
    # where, what, whose, the phase it is told in, and how it is told
    ("begin", "disk", "coordinator", "write", "No space left on device"),
    ("begin", "disk", "last", "write", "No space left on device"),
    ("put", "disk", "coordinator", "write", "No space left on device"),
    ("put", "disk", "last", "write", "No space left on device"),
    ("put", "unpicklable", "last", "write", "only here"),
    ("seal", "disk", "coordinator", "write", "No space left on device"),
    ("seal", "disk", "last", "write", "No space left on device"),
    ("commit", "disk", "coordinator", "commit", "No space left on device"),
    ("commit", "unpicklable", "coordinator", "commit", "only here"),
    ("stage", "memory", "coordinator", "stage", "cannot allocate"),
    ("stage", "memory", "last", "stage", "cannot allocate"),
    ("stage", "unpicklable", "last", "stage", "only here"),
    ("capture", "disk", "coordinator", "capture", "No space left on device"),
    ("capture", "unpicklable", "last", "capture", "only here"),
]


@pytest.mark.parametrize("first", [True, False], ids=["first save", "steady state"])
def test_what_one_rank_fails_at_all_are_told_and_the_next_save_works(
    shared: Shared, root: Path, first: bool
) -> None:
    with shared.job(root) as job:
        job.open()
        number = 0
        good = []
        if not first:
            job.save_well(number)
            good.append(number)
        for point, failure, whose, phase, cause in FAULTS:
            rank = 0 if whose == "coordinator" else job.size - 1
            if first:  # a structure that is new to all ranks
                job.end()
                job.open()
            if point in ("stage", "capture"):
                job.world[rank].do("fail_in", point=point, failure=failure)
            else:
                job.world[rank].do("fail_verb", at=point, failure=failure)
            outcomes = job.save(number + 1)
            assert_common(outcomes, rank, phase, cause)
            assert committed(root) == [step(each) for each in good], (point, failure, whose)
            job.save_well(number + 2)
            number += 2
            good.append(number)
            assert_holds_only(root, [step(each) for each in good])
        assert_whole(root, job.size, good)
        end_well(shared, job)


def test_a_state_that_one_rank_mutates_fails_the_save_of_all(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.open(overlap=True)
        job.world.all("fill", value=1)
        last = job.size - 1
        early = job.world[last].start("save", step=1, mutate=True)
        job.world[last].do("until_mutated")  # and nobody else has called save() yet
        others = job.world.begin("save", range(last), step=1)
        outcomes = [call.result() for call in [*others, early]]
        assert {each["kind"] for each in outcomes} == {"StateMutatedError"}, outcomes
        assert {tuple(each["failures"]) for each in outcomes} == {(last,)}
        assert all("noise" in each["text"] for each in outcomes), outcomes
        assert committed(root) == []
        job.save_well(2)
        assert_holds_only(root, [step(2)])
        assert_whole(root, job.size, [2])
        end_well(shared, job)


def test_a_name_that_is_taken_is_refused_on_all_ranks(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.open()
        job.save_well(1)
        assert {each["kind"] for each in job.save(1)} == {"CheckpointExistsError"}
        job.save_well(1, replace=True)
        job.save_well(2)
        assert_holds_only(root, [step(1), step(2)])
        end_well(shared, job)


# (b) One rank cancels.


def test_a_save_that_one_rank_cancels_is_cancelled_on_all(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.open()
        job.save_well(1)
        for number, rank in ((2, 0), (4, job.size - 1)):
            job.world[rank].do("hold_verb", at="seal")
            job.world.all("fill", value=number)
            calls = job.world.begin("save", step=number)
            job.world[rank].do("until_held", at="seal")
            job.world[rank].do("cancel_save")
            job.world[rank].do("release_verb", at="seal")
            outcomes = [call.result() for call in calls]
            assert {each["kind"] for each in outcomes} == {"SaveCancelled"}, outcomes
            job.world[rank].do("heal")
            job.save_well(number + 1)
        assert_holds_only(root, [step(1), step(3), step(5)])
        end_well(shared, job)


# (c) A rank is killed.

MEMBER_POINTS = ["capture", "verdict", "plan", "place", "stage", "begin", "put", "seal", "commit"]
COORDINATOR_POINTS = [
    "capture", "verdict", "plan", "place", "stage", "put", "commit", "before link", "after link",
]  # fmt: skip


class Casualty:
    """A job that has committed step 1, and one of whose ranks dies in the save of step 2."""

    def __init__(self, folder: Path, size: int, victim: int, point: str) -> None:
        self.victim, self.point = victim, point
        self.folder = folder
        folder.mkdir()
        # a store of its own process: else the coordinator's death were that of the store
        self.world = World(size, folder, host="apart" if victim == 0 else "rank 0", kind=EngineAgent)
        self.job = Job(self.world, folder / "run")
        self.survivors = [rank for rank in self.job.ranks if rank != victim]

    def prepare(self) -> None:
        self.job.open(coordination=SHORT, exit_grace=SHORT)
        self.job.save_well(1)
        self.world.all("fill", value=2)
        self.world[self.victim].do("kill_in", point=self.point)
        if self.point in ("plan", "place"):
            self.world.all("edit", what="late", value=1)  # so that a new plan is needed

    def begin(self) -> None:
        self.calls = self.world.begin("save", step=2)

    def check(self) -> None:
        outcomes = [self.calls[rank].result() for rank in self.survivors]
        self.world[self.victim].process.join(PATIENCE)
        assert self.world[self.victim].process.exitcode == -signal.SIGKILL
        for outcome in outcomes:
            assert outcome["kind"] == "SaveError", outcomes
            assert self.victim in outcome["failures"], outcomes
            assert f"rank {self.victim}" in outcome["text"], outcomes
        closed = [call.result() for call in self.world.begin("end", self.survivors)]
        assert {each["kind"] for each in closed} == {"closed"}, closed
        assert [self.world[rank].finish() for rank in self.survivors] == [0] * len(self.survivors)
        root = self.job.root
        whole_ones = [1, 2] if self.point == "after link" else [1]
        assert_whole(root, self.job.size, whole_ones)
        with CheckpointEngine(root) as engine:  # the next job, on what is left
            latest = engine.latest()
            assert latest is not None
            assert latest.step == whole_ones[-1]
            engine.save(whole(1, 3), step=3).upload_completion.result(PATIENCE)
        assert_holds_only(root, [step(number) for number in [*whole_ones, 3]])


CASES = [(2, 1, point) for point in MEMBER_POINTS] + [(2, 0, point) for point in COORDINATOR_POINTS]
CASES += [(4, 2, "put"), (4, 0, "commit")]
_GROUPS = {(2, 1): "members", (2, 0): "coordinators", (4, 2): "fours", (4, 0): "fours"}


class Casualties:
    """Cases of a group wait for their timeouts together; each test looks at its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[int, int, str], Casualty] = {}

    def get(self, case: tuple[int, int, str]) -> Casualty:
        if case not in self._made:
            group = [each for each in CASES if _GROUPS[each[:2]] == _GROUPS[case[:2]]]
            made = {each: Casualty(self._folder / "-".join(map(str, each)), *each) for each in group}
            self._made |= made
            for casualty in made.values():
                casualty.prepare()
            for casualty in made.values():
                casualty.begin()
        return self._made[case]

    def kill(self) -> None:
        for casualty in self._made.values():
            casualty.world.kill()


@pytest.fixture(scope="module")
def casualties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Casualties]:
    made = Casualties(tmp_path_factory.mktemp("casualties"))
    yield made
    made.kill()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]} on rank {case[1]} of {case[0]}")
def test_a_rank_that_is_killed_is_named_and_what_is_committed_is_whole(
    casualties: Casualties, case: tuple[int, int, str]
) -> None:
    casualty = casualties.get(case)
    try:
        casualty.check()
    finally:
        casualty.world.kill()


def test_a_rank_that_dies_after_the_commit_harms_no_save(make_job: MakeJob) -> None:
    job = make_job(2)
    job.open(coordination=SHORT, exit_grace=SHORT)
    job.save_well(1)
    job.world[1].do("kill_in", point="after commit")
    job.world.all("fill", value=2)
    calls = job.world.begin("save", step=2)
    assert calls[0].result()["kind"] == "committed"
    (outcome,) = job.save(3, [0])
    assert outcome["kind"] == "SaveError"
    assert "rank 1" in outcome["text"]
    (closed,) = job.end([0])
    assert closed["kind"] == "closed"
    assert_whole(job.root, 2, [1, 2])


# (d) A rank stands still.


@pytest.mark.parametrize("stopped", [1, 0], ids=["member", "coordinator"])
def test_a_rank_that_stands_still_is_given_up_and_saves_again_later(make_job: MakeJob, stopped: int) -> None:
    job = make_job(2, host="apart")
    job.open(coordination=SHORT)
    job.save_well(1)
    job.world[stopped].do("hold_verb", at="seal")
    job.world.all("fill", value=2)
    calls = job.world.begin("save", step=2)
    job.world[stopped].do("until_held", at="seal")
    job.world[stopped].signal(signal.SIGSTOP)
    other = calls[1 - stopped].result()
    assert other["kind"] == "SaveError", other
    assert list(other["failures"]) == [stopped]
    assert f"rank {stopped} has shown no sign of life for 2 s" in other["text"]
    job.world[stopped].signal(signal.SIGCONT)
    job.world[stopped].do("release_verb", at="seal")
    job.world[stopped].do("heal")
    mine = calls[stopped].result()
    assert mine["kind"] == "SaveError", mine
    assert stopped in mine["failures"], mine
    number = 3
    while job.save(number)[0]["kind"] != "committed":  # a coordinator that stood still is not trusted at once
        number += 1
    job.save_well(number + 1)
    assert_holds_only(job.root, [step(1), step(number), step(number + 1)])
    assert_whole(job.root, 2, [1, number, number + 1])


# (e) Ranks that do not call the same.


@pytest.mark.parametrize("skipping", [1, 0], ids=["member", "coordinator"])
def test_a_rank_that_skips_a_save_is_named_and_the_next_save_works(
    pair: Shared, root: Path, skipping: int
) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        job.world.all("fill", value=2)
        started = time.monotonic()
        (outcome,) = job.save(2, [1 - skipping])
        assert time.monotonic() - started >= SHORT
        assert outcome["kind"] == "SaveError"
        assert f"rank {skipping} did not call save() of {step(2)!r} within 2 s" in outcome["text"]
        assert list(outcome["failures"]) == [skipping]
        job.world[skipping].do("until_missed")
        job.save_well(3)
        assert_holds_only(root, [step(1), step(3)])
        end_well(pair, job)


def test_ranks_that_save_under_other_names_are_told_both(pair: Shared, root: Path) -> None:
    with pair.job(root) as job:
        job.open()
        job.world.all("fill", value=1)
        calls = [job.world[rank].start("save", name=f"best-{rank}") for rank in job.ranks]
        for call in calls:
            outcome = call.result()
            assert outcome["kind"] == "SaveError", outcome
            assert "rank 0 saved 'best-0'" in outcome["text"]
            assert "rank 1 saved 'best-1'" in outcome["text"]
        job.save_well(2)
        assert_holds_only(root, [step(2)])
        end_well(pair, job)


@pytest.mark.parametrize("loading", [1, 0], ids=["member", "coordinator"])
def test_a_rank_that_loads_while_others_save_is_told_both(pair: Shared, root: Path, loading: int) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        load = job.world[loading].start("load")
        save = job.world[1 - loading].start("save", step=2)
        outcomes = [load.result(), save.result()]
        assert [each["kind"] for each in outcomes] == ["LoadError", "SaveError"], outcomes
        for outcome in outcomes:
            assert repr(step(2)) in outcome["text"], outcomes
            assert "load" in outcome["text"], outcomes
        job.save_well(3)
        assert_holds_only(root, [step(1), step(3)])
        end_well(pair, job)


@pytest.mark.parametrize(("skipping", "verb"), [(1, "load"), (0, "load"), (1, "latest")])
def test_a_rank_that_does_not_load_is_named(pair: Shared, root: Path, skipping: int, verb: str) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        outcome = job.world[1 - skipping].start(verb).result()
        assert outcome["kind"] == "LoadError", outcome
        assert f"rank {skipping} did not call {verb}() within 2 s" in outcome["text"]
        job.world[skipping].do("until_missed")  # or what it calls next has the number of what it missed
        job.save_well(2)
        end_well(pair, job)


def test_a_state_that_one_rank_cannot_load_into_is_refused_on_all(pair: Shared, root: Path) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        job.world.all("fill", value=5)
        job.world[1].do("fail_in", point="capture", failure="memory")
        calls = job.world.begin("load")
        kinds = [call.result()["kind"] for call in calls]
        assert kinds == ["IncompatibleStateError", "IncompatibleStateError"]
        assert job.world.all("holds", value=5) == [None, None]
        end_well(pair, job)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_state_that_refuses_what_was_read_on_one_rank_fails_the_load_of_all(
    pair: Shared, root: Path, rank: int
) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        job.world[rank].do("fail_in", point="restore", failure="memory")
        outcomes = [call.result() for call in job.world.begin("load")]
        assert [each["kind"] for each in outcomes] == ["LoadError", "LoadError"]
        for outcome in outcomes:
            assert "cannot allocate" in outcome["text"]
        assert f"rank {rank}" in outcomes[1 - rank]["text"]
        job.save_well(2)
        end_well(pair, job)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", ["choose", "open", "ready", "done"])
def test_a_rank_that_leaves_a_load_at_any_point_fails_it_for_all(
    pair: Shared, root: Path, phase: str, rank: int
) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        job.world[rank].do("fail_in", point=f"after {phase}", failure="memory")
        leaves, other = (job.world[each].start("load") for each in (rank, 1 - rank))
        for outcome in (leaves.result(), other.result()):
            assert outcome["kind"] == "LoadError"
            assert f"rank {rank}: " in outcome["text"]
            assert "MemoryError: cannot allocate" in outcome["text"]
        assert [call.result()["kind"] for call in job.world.begin("load")] == ["loaded", "loaded"]
        job.save_well(2)
        end_well(pair, job)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_is_cancelled_while_a_state_is_restored_is_told_to_all(
    pair: Shared, root: Path, rank: int
) -> None:
    with pair.job(root) as job:
        job.open(coordination=SHORT)
        job.save_well(1)
        job.world[rank].do("cancel_in_restore")
        cancelled, other = (job.world[each].start("load") for each in (rank, 1 - rank))
        assert cancelled.error().kind == "CancelledError"
        assert f"rank {rank}" in other.result()["text"]
        job.save_well(2)
        end_well(pair, job)


# (f) The store's process is killed.


@pytest.mark.parametrize("host", ["apart", "rank 0"])
def test_the_end_of_the_stores_process_fails_saves_and_closes_soon(make_job: MakeJob, host: str) -> None:
    job = make_job(4, host=host)
    job.open(exit_grace=NEVER)
    job.save_well(1)
    survivors = list(job.ranks) if host == "apart" else [1, 2, 3]
    job.world[3].do("hold_verb", at="seal")
    job.world.all("fill", value=2)
    calls = job.world.begin("save", step=2)
    job.world[3].do("until_held", at="seal")
    (job.world.host or job.world[0]).kill()
    # or it might go on and miss its files, which the coordinator removes when it knows of the end
    job.world[3].do("until_store_gone")
    job.world[3].do("release_verb", at="seal")
    for rank in survivors:
        outcome = calls[rank].result()
        assert outcome["kind"] == "SaveError", outcome
        assert "the process group's store is gone" in outcome["text"]
    assert {each["kind"] for each in job.save(3, survivors)} == {"SaveError"}
    closed = [call.result() for call in job.world.begin("end", survivors)]
    assert {each["kind"] for each in closed} == {"closed"}, closed
    assert_whole(job.root, 4, [1])
    with CheckpointEngine(job.root) as engine:
        engine.save(whole(1, 4), step=4).upload_completion.result(PATIENCE)
    assert_holds_only(job.root, [step(1), step(4)])


# (g) Groups.


def test_a_group_that_is_made_again_serves_a_new_engine(make_job: MakeJob) -> None:
    job = make_job(2, host="apart")
    for number in (1, 2):
        job.open()
        job.save_well(number)
        job.end()
        job.world.all("leave")
        job.world[0].do("forget_addresses")
        job.world.all("join", port=job.world.port)
    job.open()
    job.save_well(3)
    job.world.all("fill", value=0)
    assert [each["id"] for each in job.world.all("load")] == [step(3)] * 2
    assert job.world.all("holds", value=3) == [None, None]
    job.end()
    assert_holds_only(job.root, [step(1), step(2), step(3)])


def test_two_engines_of_one_group_save_side_by_side(pair: Shared, root: Path, tmp_path: Path) -> None:
    with pair.job(root) as job:
        job.open()
        other = Job(job.world, tmp_path / "other")
        other.open(engine="other")
        job.world.all("fill", value=1)
        calls = job.world.begin("save", step=1) + job.world.begin("save", step=1, engine="other")
        assert {call.result()["kind"] for call in calls} == {"committed"}
        job.world[1].do("fail_verb", at="put", engine="other")
        job.world.all("fill", value=2)
        good = job.world.begin("save", step=2)
        bad = job.world.begin("save", step=2, engine="other")
        assert {call.result()["kind"] for call in good} == {"committed"}
        assert {call.result()["kind"] for call in bad} == {"SaveError"}
        other.save_well(3, engine="other")
        job.world.all("end", engine="other")
        assert_whole(root, 2, [1, 2])
        assert_whole(other.root, 2, [1, 3])
        end_well(pair, job)


@pytest.mark.parametrize("coordinator_rank", [0, 1])
def test_a_subgroup_saves_alone_with_a_coordinator_of_its_own(
    make_job: MakeJob, tmp_path: Path, coordinator_rank: int
) -> None:
    job = make_job(4)
    job.world.all("subgroup", name="odd", members=[1, 3])
    job.open([1, 3], group="odd", coordinator_rank=coordinator_rank)
    job.world[1].do("fill", value=1, rank=0)
    job.world[3].do("fill", value=1, rank=1)
    calls = job.world.begin("save", [1, 3], step=1)
    assert {call.result()["kind"] for call in calls} == {"committed"}
    # a rank of the others saves for itself meanwhile
    alone = Job(job.world, tmp_path / "alone")
    alone.open([0], mode="local")
    alone.save_well(7, [0])
    job.world[3].do("fail_verb", at="put")
    outcomes = job.save(2, [1, 3])
    assert {tuple(each["failures"]) for each in outcomes} == {(1,)}, "ranks are those within the group"
    assert {each["kind"] for each in job.end([0, 1, 3])} == {"closed"}
    assert_whole(job.root, 2, [1])
    assert_whole(alone.root, 1, [7])


def test_another_coordinator_rank_publishes(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.open(coordinator_rank=1)
        job.save_well(1)
        job.world[1].do("fail_verb", at="commit")
        assert_common(job.save(2), 1, "commit", "No space left on device")
        job.save_well(3)
        job.world.all("fill", value=0)
        assert {each["id"] for each in job.world.all("load")} == {step(3)}
        assert job.world.all("holds", value=3) == [None] * job.size
        assert_holds_only(root, [step(1), step(3)])
        assert_whole(root, job.size, [1, 3])
        end_well(shared, job)


def test_local_mode_beside_others_saves_a_rank_alone(pair: Shared, root: Path, tmp_path: Path) -> None:
    with pair.job(root) as job:
        job.open()
        alone = Job(job.world, tmp_path / "alone")
        alone.open([1], engine="alone", mode="local")
        alone.save_well(5, [1], engine="alone")  # rank 0 takes no part
        job.save_well(1)
        alone.save_well(6, [1], engine="alone")
        job.save_well(2)
        job.world[1].do("end", engine="alone")
        with CheckpointEngine(alone.root) as engine:
            assert [info.world_size for info in engine.checkpoints()] == [1, 1]
        assert_whole(root, 2, [1, 2])
        end_well(pair, job)


def test_a_launched_process_without_a_group_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EngineStateError, match="one of 2 that were launched together"):
        CheckpointEngine(root).open()
    assert not root.exists()


# (h) Saves in flight beside the training's own collectives.


@pytest.mark.timeout(200)
@pytest.mark.timeout(300)
def test_saves_in_flight_and_all_reduce_on_one_group_do_not_meet(
    make_job: MakeJob, request: pytest.FixtureRequest
) -> None:
    long = bool(request.config.getoption("--long"))
    seconds = 60.0 if long else 2.0
    job = make_job(4 if long else 2)
    job.open(pending_saves=2)
    outcomes = [call.result(seconds + 60.0) for call in job.world.begin("train", seconds=seconds, every=25)]
    assert [each["wrong"] for each in outcomes] == [0] * job.size
    assert {each["rounds"] for each in outcomes} == {outcomes[0]["rounds"]}
    ids = outcomes[0]["ids"]
    assert len(ids) >= 3, outcomes
    assert all(each["ids"] == ids for each in outcomes)
    job.end()
    assert_holds_only(job.root, ids)
    assert_whole(job.root, job.size, [int(name.removeprefix("step-")) for name in ids])


# (i) Roots that are not shared.


def test_roots_of_each_ranks_own_are_refused_at_the_first_save(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job(2)
    for rank in job.ranks:
        (tmp_path / f"node-{rank}").mkdir()
    job.world.all("hasten_visibility", seconds=SHORT)
    opened = [job.world[rank].start("engine", root=str(tmp_path / f"node-{rank}")) for rank in job.ranks]
    assert {call.result()["kind"] for call in opened} == {"open"}
    outcomes = job.save(1)
    assert {each["kind"] for each in outcomes} == {"SaveError"}
    for outcome in outcomes:
        assert list(outcome["failures"]) == [1]
        assert socket.gethostname() in outcome["text"], "the hosts are named"
        assert "different roots" in outcome["text"]
    assert [committed(tmp_path / f"node-{rank}") for rank in job.ranks] == [[], []]
    assert [leftovers(tmp_path / f"node-{rank}") for rank in job.ranks] == [[], []]
    assert {each["kind"] for each in job.end()} == {"closed"}


def test_a_disk_of_each_hosts_own_at_one_path_is_refused_at_the_first_save(
    make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(2)
    disk = tmp_path / "disk"
    disk.mkdir()
    job.world.all("own_disk", at=str(disk))
    job.world.all("hasten_visibility", seconds=SHORT)
    job.root = disk / "run"
    job.open()
    outcomes = job.save(1)
    assert {each["kind"] for each in outcomes} == {"SaveError"}, outcomes
    for outcome in outcomes:
        assert "on host node-1 there is no" in outcome["text"]
        assert "made on host node-0" in outcome["text"]
        assert str(job.root) in outcome["text"]
    assert job.world.all("listed", root=str(disk)) in ([["run"], []], [[], []])
    assert list(disk.iterdir()) == [], "the disks were the processes' own"
    assert {each["kind"] for each in job.end()} == {"closed"}


# (j) Loading.


def _file_of(root: Path, number: int, rank: int) -> Path:
    (path,) = (path for path in data_files(root / step(number)) if path.name.startswith(f"__{rank}_"))
    return path


def _own_bytes(root: Path, number: int, rank: int) -> int:
    """A position amid a rank's own tensor, in a block that no other rank reads."""
    with CheckpointEngine(root) as engine:
        state = engine.read(number)
    raw = state["own"][f"rank_{rank}"]["noise"].numpy().tobytes()
    return _file_of(root, number, rank).read_bytes().index(raw) + len(raw) // 2


@pytest.mark.parametrize("damage", ["missing", "short", "corrupt"])
def test_what_is_wrong_with_one_ranks_file_all_are_told_and_latest_falls_back(
    shared: Shared, root: Path, damage: str
) -> None:
    with shared.job(root) as job:
        job.open()
        for number in (1, 2):
            job.save_well(number)
        last = job.size - 1
        path = _file_of(root, 2, last)
        if damage == "missing":
            path.unlink()
        elif damage == "short":
            path.write_bytes(path.read_bytes()[:-4096])
        else:
            flip(path, _own_bytes(root, 2, last))
        job.world.all("fill", value=9)
        calls = job.world.begin("load", source=2)
        outcomes = [call.result() for call in calls]
        assert {each["kind"] for each in outcomes} == {"CorruptCheckpointError"}, outcomes
        touched = damage == "corrupt"
        assert {each["partially_loaded"] for each in outcomes} == {touched}, outcomes
        assert all(path.name in each["text"] for each in outcomes), outcomes
        if touched:
            assert all(f"rank {last}" in each["text"] for each in outcomes[:-1]), outcomes
        else:
            assert job.world.all("holds", value=9) == [None] * job.size
        calls = job.world.begin("load")
        outcomes = [call.result() for call in calls]
        assert [(each["kind"], each["id"], each["skipped"]) for each in outcomes] == [
            ("loaded", step(1), (step(2),))
        ] * job.size
        reasons = [each["why"] for each in outcomes]
        assert reasons == [reasons[0]] * job.size, reasons
        assert path.name in reasons[0][step(2)]
        assert job.world.all("holds", value=1) == [None] * job.size
        end_well(shared, job)


def test_latest_tells_every_rank_which_newer_ones_are_damaged_and_why(pair: Shared, root: Path) -> None:
    with pair.job(root) as job:
        job.open()
        for number in (1, 2, 3):
            job.save_well(number)
        for number in (2, 3):
            _file_of(root, number, 0).unlink()
        found = job.world.all("latest")
        assert {each["id"] for each in found} == {step(1)}
        logged = [each["logged"] for each in found]
        assert logged == [logged[0]] * job.size
        for name, text in zip((step(3), step(2)), logged[0], strict=True):
            assert name in text
            assert "No such file" in text
        end_well(pair, job)


def test_a_metadata_file_that_names_what_no_checkpoint_needs_is_passed_over_by_the_load_of_all(
    shared: Shared, root: Path
) -> None:
    with shared.job(root) as job:
        job.open()
        for number in (1, 2):
            job.save_well(number)
        (root / step(2) / ".metadata").write_bytes(pickle.dumps(os.system))
        job.world.all("fill", value=9)
        outcomes = [call.result() for call in job.world.begin("load", source=2)]
        assert all("which no checkpoint needs" in each["text"] for each in outcomes), outcomes
        assert {each["id"] for each in job.world.all("latest")} == {step(1)}
        outcomes = [call.result() for call in job.world.begin("load")]
        assert [(each["kind"], each["id"], each["skipped"]) for each in outcomes] == [
            ("loaded", step(1), (step(2),))
        ] * job.size
        assert job.world.all("holds", value=1) == [None] * job.size
        end_well(shared, job)


def test_a_newest_checkpoint_that_is_gone_before_it_is_open_is_no_end_of_the_load_of_all(
    pair: Shared, root: Path
) -> None:
    """The coordinator's word counts: the others may see it still."""
    with pair.job(root) as job:
        job.open()
        for number in (1, 2):
            job.save_well(number)
        job.world.all("fill", value=9)
        job.world[0].do("fail_verb", at="open", failure="missing", nth=3)  # after two to put them in order
        outcomes = [call.result() for call in job.world.begin("load")]
        assert [(each["kind"], each.get("id")) for each in outcomes] == [("loaded", step(1))] * job.size, (
            outcomes
        )
        assert job.world.all("holds", value=1) == [None] * job.size
        job.world.all("heal")
        end_well(pair, job)


def test_an_atomic_load_that_one_rank_fails_leaves_every_state_alone(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.open()
        job.save_well(1)
        last = job.size - 1
        flip(_file_of(root, 1, last), _own_bytes(root, 1, last))
        job.world.all("fill", value=9)
        outcomes = [call.result() for call in job.world.begin("load", atomic=True)]
        assert {each["kind"] for each in outcomes} == {"CorruptCheckpointError"}, outcomes
        assert {each["partially_loaded"] for each in outcomes} == {False}, outcomes
        assert job.world.all("holds", value=9) == [None] * job.size
        end_well(shared, job)


@pytest.mark.parametrize(
    ("verb", "failure"), [("size", "missing"), ("read_into", "unreadable"), ("open", "unreadable")]
)
@pytest.mark.parametrize("whose", ["coordinator", "last"])
def test_what_one_rank_cannot_read_fails_the_load_of_all(
    shared: Shared, root: Path, verb: str, failure: str, whose: str
) -> None:
    with shared.job(root) as job:
        job.open()
        job.save_well(1)
        job.world.all("fill", value=9)
        rank = 0 if whose == "coordinator" else job.size - 1
        job.world[rank].do("fail_verb", at=verb, failure=failure)
        outcomes = [call.result() for call in job.world.begin("load", source=1)]
        others = [each for at, each in enumerate(outcomes) if at != rank]
        assert all(each["kind"] != "loaded" for each in outcomes), outcomes
        assert all(f"rank {rank}" in each["text"] for each in others), outcomes
        assert {each["partially_loaded"] for each in outcomes} <= {None, False}, outcomes
        assert job.world.all("holds", value=9) == [None] * job.size
        job.world.all("heal")
        assert {each["kind"] for each in job.world.all("load")} == {"loaded"}
        assert job.world.all("holds", value=1) == [None] * job.size
        end_well(shared, job)


def test_a_leaf_that_one_rank_does_not_trust_is_loaded_by_none(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        for rank in job.ranks:
            job.world[rank].start("fill", value=1, foreign=True)
        job.open(unsafe=True)
        assert {each["kind"] for each in job.world.all("save", step=1)} == {"committed"}
        job.end()
        opened = [
            job.world[rank].start("engine", root=str(root), unsafe=rank != job.size - 1) for rank in job.ranks
        ]
        assert {call.result()["kind"] for call in opened} == {"open"}
        job.world.all("fill", value=9, foreign=True)
        outcomes = [call.result() for call in job.world.begin("load")]
        assert {each["kind"] for each in outcomes} == {"UntrustedCheckpointError"}, outcomes
        assert all("Foreign" in each["text"] for each in outcomes), outcomes
        assert job.world.all("holds", value=9) == [None] * job.size
        end_well(shared, job)


LOAD_CASES = [(victim, point) for victim in (1, 0) for point in ("ready", "read_into", "done")]


def test_a_rank_that_is_killed_while_it_loads_is_named(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        jobs: dict[tuple[int, str], Job] = {}
        for victim, point in LOAD_CASES:  # at once: each waits for its timeout
            folder = tmp_path / f"{point}-{victim}"
            folder.mkdir()
            world = stack.enter_context(World(2, folder, host="apart", kind=EngineAgent))
            job = jobs[victim, point] = Job(world, folder / "run")
            job.open(coordination=SHORT, exit_grace=SHORT)
            job.save_well(1)
            world[victim].do("kill_in", point=point)
            world.all("fill", value=9)
        calls = {case: job.world.begin("load") for case, job in jobs.items()}
        for (victim, point), job in jobs.items():
            outcome = calls[victim, point][1 - victim].result()
            assert outcome["kind"] == "LoadError", (victim, point, outcome)
            assert f"rank {victim}" in outcome["text"], (victim, point, outcome)
            (closed,) = job.end([1 - victim])
            assert closed["kind"] == "closed"
            assert_holds_only(job.root, [step(1)])


# (k) Steady state.


def test_a_steady_save_is_two_messages_up_and_two_down_and_no_collective(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        job.world.all("one_collective")
        (before,) = set(job.world.all("collectives"))
        assert before >= 1, "the group counts"
        job.open()
        job.save_well(1)
        counts = job.world.all("messages")
        for number in range(2, 7):
            job.save_well(number)
            now = job.world.all("messages")
            members = job.size - 1
            # digest and verdict, outcome and its confirmation
            assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(counts, now, strict=True)] == [
                (2 * members, 2 * members),
                *[(2, 2)] * members,
            ]
            counts = now
        job.world.all("fill", value=0)
        assert {each["kind"] for each in job.world.all("load")} == {"loaded"}
        assert set(job.world.all("collectives")) == {before}
        assert_whole(root, job.size, range(1, 7))
        end_well(shared, job)


def test_nothing_calls_a_collective_by_name(make_job: MakeJob) -> None:
    job = make_job(2)
    job.world.all("forbid_collectives")
    job.open()
    job.save_well(1)
    job.save_well(2)
    job.world.all("fill", value=0)
    assert {each["kind"] for each in job.world.all("load")} == {"loaded"}
    assert {each["kind"] for each in job.end()} == {"closed"}


def test_a_structure_that_changes_on_one_rank_is_planned_anew_by_all(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        last = job.size - 1
        job.open()
        job.save_well(1)
        job.save_well(2)
        before = job.world.all("messages")
        job.world.all("fill", value=3)
        job.world[last].do("edit", what="model.late", value=3.0)  # a tensor that only this rank has
        assert {each["kind"] for each in job.world.all("save", step=3)} == {"committed"}
        planned = job.world.all("messages")
        assert all(b[0] - a[0] > 2 for a, b in zip(before, planned, strict=True)), "a full plan"
        job.world.all("fill", value=4)
        job.world[last].do("edit", what="model.late", value=4.0)
        assert {each["kind"] for each in job.world.all("save", step=4)} == {"committed"}
        steady = job.world.all("messages")
        assert all(b[0] - a[0] == 2 for a, b in zip(planned[1:], steady[1:], strict=True)), "steady again"
        job.save_well(5)  # and back
        job.save_well(6)
        with CheckpointEngine(root) as engine:
            for number, extra in ((1, None), (2, None), (3, 3.0), (4, 4.0), (5, None), (6, None)):
                state = engine.read(number)
                late = state["model"].pop("late", None)
                assert (late is None) == (extra is None)
                assert late is None or (late == extra).all()
                assert_same(state, whole(job.size, number))
        end_well(shared, job)


@pytest.mark.parametrize("changed", [False, True], ids=["reuse", "replan"])
def test_a_rank_stages_before_the_others_have_come(pair: Shared, root: Path, changed: bool) -> None:
    """And holds its state until they have, since then all may have to plan anew."""
    with pair.job(root) as job:
        job.open()
        job.save_well(1)
        job.world.all("fill", value=2)
        job.world[0].do("watch_staging")
        early = job.world[0].start("save", step=2, mutate=True)
        job.world[0].do("until_copied")
        waiting = job.world[0].start("until_mutated")
        if changed:
            job.world[1].do("edit", what="model.late", value=2.0)
        assert not waiting.done(), "staged is said when all have come"
        late = job.world[1].start("save", step=2)
        assert [call.result()["kind"] for call in (early, late)] == ["committed", "committed"]
        waiting.result()
        with CheckpointEngine(root) as engine:
            state = engine.read(2)
        assert (state["model"].pop("late", None) is not None) == changed
        assert_same(state, whole(2, 2))
        end_well(pair, job)


@pytest.mark.parametrize("steady", [False, True], ids=["first save", "steady state"])
def test_a_leaf_that_drifts_on_one_rank_is_refused_by_name(shared: Shared, root: Path, steady: bool) -> None:
    with shared.job(root) as job:
        last = job.size - 1
        job.open()
        good = []
        if steady:
            job.save_well(1)
            job.save_well(2)
            good = [1, 2]
        job.world.all("fill", value=3)
        job.world[last].do("edit", what="count", value=4)
        outcomes = [call.result() for call in job.world.begin("save", step=3)]
        for outcome in outcomes:
            assert outcome["kind"] == "SaveError", outcomes
            assert f"count differs between rank 0 and rank {last}" in outcome["text"]
            assert "PerRank(...)" in outcome["text"]
            assert outcome["phase"] == "plan"
        job.save_well(5)
        assert_holds_only(root, [step(number) for number in [*good, 5]])
        assert_whole(root, job.size, [*good, 5])
        end_well(shared, job)


def test_a_dtype_that_changes_is_noticed(shared: Shared, root: Path) -> None:
    with shared.job(root) as job:
        last = job.size - 1
        job.open()
        job.save_well(1)
        job.world.all("fill", value=2)
        job.world[last].do("edit", what="w1", value="torch.float64")
        for outcome in job.world.all("save", step=2):
            assert outcome["kind"] == "SaveError", outcome
            assert "model.w1 is" in outcome["text"]
            assert f"float64 on rank {last}" in outcome["text"]
        job.world.all("fill", value=3)
        job.world.all("edit", what="w1", value="torch.float64")  # on all ranks it is a new plan
        assert {each["kind"] for each in job.world.all("save", step=3)} == {"committed"}
        with CheckpointEngine(root) as engine:
            wanted = whole(job.size, 3)
            wanted["model"]["w1"] = wanted["model"]["w1"].double()
            assert_same(engine.read(3), wanted)
        end_well(shared, job)
