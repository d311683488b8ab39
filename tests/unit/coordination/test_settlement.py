"""One outcome for all ranks, however failures arrive: the coordinator's books, and the error made of them."""

from __future__ import annotations

from typing import Any

from dcp_async.coordination.failures import PhaseFailure, RemoteError
from dcp_async.coordination.messages import Send, Settled, Stopped
from dcp_async.coordination.settlement import Settlement
from dcp_async.response import AsyncSaveResponse, Place, ResponseWriter
from dcp_async.save.failures import in_phase, save_error


def failure(message: str, phase: str = "write") -> RemoteError:
    return RemoteError(phase=phase, type_name="OSError", message=message)


PATIENCE = 3.0


class Books:
    """A settlement of three ranks, and what each was told."""

    def __init__(self) -> None:
        self.told: dict[int, list[int]] = {}
        self.settlement = Settlement(world_size=3, patience=PATIENCE)

    def tell(self, sends: list[Send]) -> None:
        for send in sends:
            assert isinstance(send.message, Settled)
            self.told[send.rank] = list(send.message.failures)

    def failed(self, rank: int, now: float = 0.0) -> None:
        self.tell(self.settlement.failed("u", {rank: failure(f"of rank {rank}")}, now))

    def stopped(self, rank: int, now: float = 0.0) -> None:
        self.tell(self.settlement.stopped(Stopped(rank=rank, uid="u", flag=False), now))


def test_every_rank_is_told_all_failures_that_came_before_all_had_stopped() -> None:
    books = Books()
    books.failed(0)
    books.stopped(0)
    books.stopped(1)
    assert books.told == {}
    books.failed(2)
    books.stopped(2)
    assert books.told == {rank: [0, 2] for rank in range(3)}


def test_a_failure_that_comes_after_the_verdict_changes_it_for_nobody() -> None:
    books = Books()
    books.failed(1)
    for rank in (0, 1, 2):
        books.stopped(rank)
    books.failed(2)
    books.stopped(2)
    assert books.told == {rank: [1] for rank in range(3)}


def test_a_rank_that_hangs_keeps_nobody_longer_than_the_patience() -> None:
    books = Books()
    books.failed(0, now=10.0)
    books.stopped(1, now=11.0)
    assert books.settlement.deadlines() == [10.0 + PATIENCE]
    books.tell(books.settlement.tick(10.0 + PATIENCE - 0.1))
    assert books.told == {}
    books.tell(books.settlement.tick(10.0 + PATIENCE))
    assert books.told == {1: [0]}
    books.stopped(2, now=20.0)
    assert books.told == {1: [0], 2: [0]}, "who comes later hears the same"


def test_a_rank_that_left_is_waited_for_no_longer() -> None:
    books = Books()
    books.failed(0)
    books.stopped(1)
    books.tell(books.settlement.gone(2))
    assert books.told == {1: [0]}


def response() -> AsyncSaveResponse:
    return ResponseWriter(
        checkpoint_id="c", step=1, place=Place(), cancel=lambda: None, on_own_thread=lambda: False
    ).response


def raised(error: Exception) -> BaseException:
    try:
        with in_phase("write"):
            raise error
    except PhaseFailure as caught:
        return caught


def test_a_rank_whose_failure_came_too_late_raises_what_the_others_raise() -> None:
    verdict = {1: failure("disk full")}
    arguments: dict[str, Any] = {"verdict": verdict}
    first = save_error(raised(OSError("disk full")), "write", response(), rank=1, **arguments)
    late = save_error(raised(MemoryError("none left")), "write", response(), rank=2, **arguments)
    assert str(late) == str(first)
    assert (type(late), late.phase, list(late.failures)) == (type(first), first.phase, [1])
    assert isinstance(late.__cause__, MemoryError)
