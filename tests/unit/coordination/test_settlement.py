"""One outcome for all ranks, however failures arrive: the coordinator's books, and the error made of them."""

from __future__ import annotations

from typing import Any

from dcp_async.coordination.failures import PhaseFailure, RemoteError
from dcp_async.coordination.settlement import Settlement, Verdict
from dcp_async.response import AsyncSaveResponse, Place, ResponseWriter
from dcp_async.save.failures import save_error
from dcp_async.save.pipeline import in_phase


def failure(message: str, phase: str = "write") -> RemoteError:
    return RemoteError(phase=phase, type_name="OSError", message=message)


class Books:
    """A settlement of three ranks, and what each was told."""

    def __init__(self, patience: float = 3600.0) -> None:
        self.told: dict[int, Verdict] = {}
        self.settlement = Settlement(world_size=3, patience=patience, tell=self._tell, gone={})

    def _tell(self, rank: int, uid: str, verdict: Verdict) -> None:
        self.told[rank] = verdict


async def test_every_rank_is_told_all_failures_that_came_before_all_had_stopped() -> None:
    books = Books()
    books.settlement.failed("u", {0: failure("first")})
    books.settlement.stopped(0, "u", False)
    books.settlement.stopped(1, "u", False)
    assert books.told == {}
    books.settlement.failed("u", {2: failure("second")})
    books.settlement.stopped(2, "u", False)
    assert [list(verdict) for verdict, _ in books.told.values()] == [[0, 2]] * 3
    books.settlement.close()


async def test_a_failure_that_comes_after_the_verdict_changes_it_for_nobody() -> None:
    books = Books()
    books.settlement.failed("u", {1: failure("first")})
    for rank in (0, 1, 2):
        books.settlement.stopped(rank, "u", False)
    books.settlement.failed("u", {2: failure("late")})
    books.settlement.stopped(2, "u", False)
    assert [list(verdict) for verdict, _ in books.told.values()] == [[1]] * 3
    books.settlement.close()


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
