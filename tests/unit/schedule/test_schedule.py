"""``should_save`` alone and among ranks: a clock and a coordination that only the test moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, cast

import pytest

from dcp_async import Adaptive, Every, OnSignal, PreemptionError, SavePolicy
from dcp_async._concurrency import LoopThread
from dcp_async.coordination import Coordinator, RemoteError, RemoteFailure
from dcp_async.coordination.messages import SyncRequested
from dcp_async.coordination.sync_points import SyncCalls, SyncPoints
from dcp_async.response import Place, ResponseWriter
from dcp_async.schedule import SaveSchedule
from tests.support.doubles import PATIENCE


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Ranks:
    """Schedules of several ranks on one loop; their coordination answers when the test lets it."""

    def __init__(self, loop: LoopThread, size: int, policy: SavePolicy | None) -> None:
        self.loop, self.size = loop, size
        self.clock = Clock()
        self.points = SyncPoints()
        self.num_requests = 0
        self.failure: Exception | None = None
        """What the next agreement ends with."""
        self.answers: dict[int, Any] = {}
        self.published: asyncio.Future[Any] | None = None
        self.is_paused = False
        self.coordinations = [Coordination(self, rank) for rank in range(size)]
        self.schedules = [SaveSchedule(policy, timeout=100.0, clock=self.clock) for _ in range(size)]
        for schedule, coordination in zip(self.schedules, self.coordinations, strict=True):
            schedule.begin(cast(Coordinator, coordination), loop)
        self._threads = ThreadPoolExecutor(size)

    def turn(self) -> None:
        """Let the loop do all that is ready."""

        async def turns() -> None:
            for _ in range(50):
                await asyncio.sleep(0)

        self.loop.submit(turns()).future.result(PATIENCE)

    def publish(self) -> None:
        self.is_paused = False
        self.loop.call_soon(self.decide)
        self.turn()

    def decide(self) -> None:
        if len(self.answers) == self.size and not self.is_paused and self.published is not None:
            self.published.set_result([self.answers[rank] for rank in range(self.size)])

    def ask(self, rank: int, step: int) -> bool:
        """In this thread: it must not have to wait for another rank's step."""
        return self.schedules[rank].should_save(step)

    def asking(self, rank: int, step: int) -> Callable[[], bool]:
        """In a thread of the rank's own."""
        future = self._threads.submit(self.ask, rank, step)
        return lambda: future.result(PATIENCE)

    def end(self) -> None:
        for coordination in self.coordinations:
            self.loop.call_soon(coordination.sync_calls.end)
        self._threads.shutdown()


class Coordination:
    """One rank's part of ``Ranks``."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.world_size, self.is_coordinator = rank, ranks.size, rank == 0
        self.sync_calls = SyncCalls()
        self.failed: list[str] = []
        self._ranks = ranks

    def request_sync_point(self, why: str, stop: bool, seconds: float) -> None:
        self._ranks.num_requests += 1
        self._call(self._ranks.points.requested(SyncRequested(why=why, stop=stop, seconds=seconds)))

    def _call(self, called: Any) -> None:
        if called is not None:
            for other in self._ranks.coordinations:
                other.sync_calls.put(called)

    async def exchange(
        self, uid: str, phase: str, message: Any, decide: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]]
    ) -> Any:
        ranks = self._ranks
        if ranks.published is None:
            ranks.published = asyncio.get_running_loop().create_future()
        published = ranks.published
        ranks.answers[self.rank] = message
        ranks.decide()
        messages = await asyncio.shield(published)
        if ranks.failure is not None:
            raise ranks.failure
        return (await decide(messages))[self.rank]

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        self.failed.append(str(error))

    def forget(self, uid: str) -> None:
        if self._ranks.answers.pop(self.rank, None) is not None and not self._ranks.answers:
            self._ranks.published = None
            self._call(self._ranks.points.over(uid))


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("test-loop")
    thread.start()
    yield thread
    thread.stop()
    thread.finished.result(PATIENCE)


@pytest.fixture
def make(loop: LoopThread) -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(size: int, policy: SavePolicy | None = None) -> Ranks:
        made.append(Ranks(loop, size, policy))
        return made[-1]

    yield make
    for ranks in made:
        ranks.end()


def response(step: int) -> ResponseWriter:
    def never() -> NoReturn:
        raise AssertionError

    return ResponseWriter(
        checkpoint_id=f"step-{step}", step=step, cancel=never, on_own_thread=lambda: False, place=Place()
    )


# --- one rank -----------------------------------------------------------------------------------


def test_without_a_policy_no_step_is_saved(make: Callable[..., Ranks]) -> None:
    assert not any(make(1).ask(0, step) for step in range(10))


def test_a_question_that_is_asked_again_has_the_same_answer_until_the_step_is_saved(
    make: Callable[..., Ranks],
) -> None:
    ranks = make(1, Every(steps=2))
    assert [ranks.ask(0, step) for step in (0, 0, 1, 1, 2, 2)] == [True, True, False, False, True, True]
    ranks.schedules[0].saved(response(2).response, 0.1)
    assert not ranks.ask(0, 2)


def test_the_clock_runs_from_the_first_question_and_from_each_save(make: Callable[..., Ranks]) -> None:
    ranks = make(1, Every(seconds=600))
    ranks.clock.now += 10_000  # loading, say
    assert not ranks.ask(0, 0)
    ranks.clock.now += 599
    assert not ranks.ask(0, 1)
    ranks.clock.now += 1
    assert ranks.ask(0, 2)
    ranks.clock.now += 599
    assert not ranks.ask(0, 3)
    ranks.schedules[0].saved(response(3).response, 0.1)  # of the trainer's own accord
    ranks.clock.now += 599
    assert not ranks.ask(0, 4)
    ranks.clock.now += 1
    assert ranks.ask(0, 5)


def test_a_save_by_steps_starts_the_seconds_anew(make: Callable[..., Ranks]) -> None:
    ranks = make(1, Every(steps=10, seconds=600))
    assert ranks.ask(0, 10)
    ranks.clock.now += 500
    assert ranks.ask(0, 20)
    ranks.clock.now += 500
    assert not ranks.ask(0, 21)


def test_adaptive_takes_its_share_of_the_time(make: Callable[..., Ranks]) -> None:
    ranks = make(1, Adaptive(overhead=0.02))
    clock, saves = ranks.clock, []
    for step in range(2000):
        clock.now += 1.0
        if ranks.ask(0, step):
            writer = response(step)
            clock.now += 0.5  # the stall
            ranks.schedules[0].saved(writer.response, 0.5)
            writer.failed(cast(Any, ValueError()))  # it has ended, which is all that counts here
            saves.append(step)
    assert saves[0] == 0, "the first is the measurement"
    assert 0.5 * len(saves) / 2000 == pytest.approx(0.02, rel=0.05)


def test_what_optimizers_wait_for_a_save_is_part_of_its_cost() -> None:
    clock, seen = Clock(), list[float]()

    class Seeing(SavePolicy):
        def interval(self, costs: Sequence[Any]) -> float | None:
            seen[:] = [cost.stall for cost in costs]
            return None

    waited = 0.0
    schedule = SaveSchedule(Seeing(), timeout=1.0, waited=lambda: waited, clock=clock)
    schedule._coordinator = cast(Coordinator, type("Alone", (), {"world_size": 1, "is_coordinator": True}))
    schedule.saved(response(0).response, 0.25)
    waited = 2.0
    schedule.saved(response(1).response, 0.5)
    schedule.should_save(2)
    assert seen == [2.25, 0.5]


# --- several ranks ------------------------------------------------------------------------------


def test_policies_by_steps_send_nothing(make: Callable[..., Ranks]) -> None:
    ranks = make(2, Every(steps=3) | Every(steps=5))
    answers = [[ranks.ask(rank, step) for step in range(16)] for rank in range(2)]
    assert answers[0] == answers[1]
    ranks.turn()
    assert ranks.num_requests == 0


def test_what_is_due_by_the_clock_is_saved_at_one_step_by_ranks_at_different_ones(
    make: Callable[..., Ranks],
) -> None:
    ranks = make(3, Every(seconds=60))
    steps = {0: 4, 1: 6, 2: 5}
    for rank, last in steps.items():
        assert not any(ranks.ask(rank, step) for step in range(last + 1))
    ranks.clock.now += 60
    assert not ranks.ask(0, 5), "the coordinator asks the others, and goes on"
    ranks.turn()
    answers = {rank: [ranks.ask(rank, step) for step in range(steps[rank] + 1, 10)] for rank in (1, 2)}
    answers[0] = [ranks.ask(0, step) for step in range(6, 10)]
    assert answers == {
        0: [False, True, False, False],
        1: [True, False, False],
        2: [False, True, False, False],
    }
    assert ranks.num_requests == 1


def test_other_ranks_clocks_ask_for_nothing(make: Callable[..., Ranks]) -> None:
    ranks = make(2, Every(seconds=60))
    ranks.ask(1, 0)
    ranks.clock.now += 1000
    assert not ranks.ask(1, 1)
    ranks.turn()
    assert ranks.num_requests == 0


def test_a_rank_that_has_told_its_step_waits_for_what_comes_of_it(make: Callable[..., Ranks]) -> None:
    ranks = make(2)
    ranks.is_paused = True
    ranks.ask(0, 3)
    ranks.schedules[1].stop("rank 1 received SIGTERM", 5.0)
    ranks.turn()
    first, second = ranks.asking(0, 4), ranks.asking(1, 0)
    ranks.publish()
    assert (first(), second()) == (True, False)
    assert [schedule.stop_step for schedule in ranks.schedules] == [4, None]
    assert [ranks.ask(1, step) for step in range(1, 6)] == [False, False, False, True, False]
    assert ranks.schedules[1].stop_step == 4


def test_a_second_signal_on_any_rank_asks_for_no_second_stop(make: Callable[..., Ranks]) -> None:
    ranks = make(2)
    for schedule in ranks.schedules:
        schedule.stop("SIGTERM", 5.0)
        schedule.stop("SIGTERM", 5.0)
    ranks.turn()
    assert ranks.num_requests == 2
    assert [[ranks.ask(rank, step) for step in range(3)] for rank in range(2)] == [[True, False, False]] * 2


def test_ranks_that_can_not_agree_to_stop_are_told_why(make: Callable[..., Ranks]) -> None:
    ranks = make(2)
    lost = RemoteError(phase="sync", type_name="TimeoutError", message="rank 1 has shown no sign of life")
    ranks.failure = RemoteFailure({1: lost})
    ranks.schedules[0].stop("rank 0 received SIGTERM", 5.0)
    ranks.turn()
    for rank in range(2):
        with pytest.raises(PreemptionError, match=r"rank 0 received SIGTERM, and .*rank 1 has shown no sign"):
            ranks.ask(rank, 0)
        assert ranks.schedules[rank].stop_step is None
        assert not ranks.ask(rank, 1), "it is told once"


def test_who_trains_on_after_that_may_be_asked_to_stop_again(make: Callable[..., Ranks]) -> None:
    ranks = make(2)
    ranks.failure = RemoteFailure({1: RemoteError(phase="sync", type_name="E", message="rank 1 is slow")})
    ranks.schedules[0].stop("rank 0 received SIGTERM", 5.0)
    ranks.turn()
    for rank in range(2):
        with pytest.raises(PreemptionError, match="rank 1 is slow"):
            ranks.ask(rank, 0)
    ranks.failure = None
    ranks.schedules[1].stop("rank 1 received SIGTERM", 5.0)
    ranks.turn()
    assert [ranks.ask(rank, 1) for rank in range(2)] == [True, True]
    assert [schedule.stop_step for schedule in ranks.schedules] == [1, 1]


def test_the_clock_asks_for_nothing_once_ranks_are_to_stop(make: Callable[..., Ranks]) -> None:
    ranks = make(2, Every(seconds=60))
    ranks.ask(0, 0)
    ranks.schedules[1].stop("rank 1 received SIGTERM", 5.0)
    ranks.turn()
    ranks.clock.now += 1000
    assert ranks.ask(0, 1)
    ranks.turn()
    assert ranks.num_requests == 1


def test_training_goes_on_when_a_save_by_the_clock_can_not_be_agreed_on(
    make: Callable[..., Ranks], caplog: pytest.LogCaptureFixture
) -> None:
    ranks = make(2, Every(seconds=60))
    ranks.failure = RemoteFailure({1: RemoteError(phase="sync", type_name="E", message="rank 1 is gone")})
    ranks.ask(0, 0)
    ranks.clock.now += 60
    ranks.ask(0, 1)
    ranks.turn()
    assert [ranks.ask(rank, 2) for rank in range(2)] == [False, False]
    assert "rank 1 is gone; training goes on" in caplog.text
    ranks.failure = None
    ranks.clock.now += 60
    ranks.ask(0, 3)
    ranks.turn()
    assert [ranks.ask(rank, 4) for rank in range(2)] == [True, True]


def test_a_question_in_the_steady_state_costs_microseconds(make: Callable[..., Ranks]) -> None:
    ranks = make(2, Every(steps=1_000_000, seconds=1e6) | Adaptive(overhead=0.02, mtbf=1e12) | OnSignal())
    ranks.schedules[0].saved(response(0).response, 1.0)

    def seconds(start: int) -> float:
        began = time.perf_counter()
        for step in range(start, start + 1000):
            ranks.ask(0, step)
        return (time.perf_counter() - began) / 1000

    # the best of many: what it costs, and not what else the machine does
    assert min(seconds(start) for start in range(1, 20_001, 1000)) < 100e-6
