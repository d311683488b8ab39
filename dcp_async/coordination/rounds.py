"""The coordinator's books: which rank sent what of which save, and what follows from it.

Enters: ranks' messages, failures, goodbyes, silence. Leaves: complete rounds, and failures that every rank is
told. Invariant: a round ends in one way for all ranks. While a decision on a save is being made, its failures
wait, because ranks must not take for failed what was just committed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .failures import RemoteError, name_ranks
from .waiters import REMEMBERED, Waiters

MEETINGS = {"verdict": "save()", "choose": "load()", "latest": "latest()"}
"""Verbs of the engine, by their first phase. In it all ranks have to arrive within a time of the first: later
ones take as long as writing or reading takes."""
_AFTER_USER_CODE = frozenset({"ask", "unexpected", "restore"})
"""In these a rank arrives when its state's ``state_dict()`` or ``load_state_dict()`` has returned."""
_OF_LOADS = frozenset({"choose", "open", "ask", "unexpected", "ready", "done", "restore"})


def _kind(phase: str) -> str:
    """``phase`` without the number of one that there may be several of."""
    return phase.partition(" ")[0]


@dataclass(slots=True)
class _Round:
    """One phase of one save."""

    ordinal: int | None
    name: str
    messages: dict[int, Any] = field(default_factory=dict)
    deadline: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Held:
    """Failures of a save on which ``depth`` decisions are being made."""

    depth: int = 0
    failures: list[tuple[dict[int, RemoteError], int | None]] = field(default_factory=list)


class Rounds:
    """Owned by the coordinator's ``StoreCoordinator``; all of it belongs to the engine's loop."""

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        timeout: float,
        complete: Callable[[str, str, list[Any]], None],
        failed: Callable[[str, dict[int, RemoteError], int | None], None],
        late: Callable[[str], None],
        noted: Callable[[str, dict[int, RemoteError]], None],
        waiters: Waiters,
    ) -> None:
        """``complete`` is told a round's messages in rank order, ``failed`` what to tell all ranks (but the
        reporter, if there is one), ``late`` the uid of a round whose time is up, ``noted`` each failure, also
        when all have been told of an earlier one; ``waiters`` knows what failed or is over."""
        self.gone: dict[int, str] = {}
        """Ranks that closed their engine, and how to say so."""
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._complete, self._failed, self._late, self._waiters = complete, failed, late, waiters
        self._noted = noted
        self._rounds: dict[tuple[str, str], _Round] = {}
        self._reached: OrderedDict[str, dict[int, str]] = OrderedDict()
        self._names: OrderedDict[int, dict[str, tuple[str, set[int]]]] = OrderedDict()
        self._held: dict[str, _Held] = {}
        self._busy: dict[int, tuple[str, float]] = {}
        """Rank -> (what code of the trainer's it is in, loop.time() when that was called)."""

    def __repr__(self) -> str:
        return f"<Rounds {[(*key, sorted(of.messages)) for key, of in self._rounds.items()]}>"

    def __bool__(self) -> bool:
        """Whether anybody waits for anybody."""
        return bool(self._rounds)

    def arrived(self, rank: int, uid: str, phase: str, ordinal: int | None, name: str, message: Any) -> None:
        """``rank`` sent its message."""
        if self._waiters.failure(uid) is not None:
            return  # all have been told
        if self._waiters.is_over(uid):
            if rank != self._rank:
                self._failed(uid, {self._rank: unanswered(self._rank, phase)}, None)
            return
        if ordinal is not None and self._differs(rank, uid, ordinal, name, phase):
            return
        self._reached.setdefault(uid, {})[rank] = phase
        while len(self._reached) > REMEMBERED:
            self._reached.popitem(last=False)
        of = self._rounds.setdefault((uid, phase), _Round(ordinal, name))
        of.messages[rank] = message
        if len(of.messages) == self._world_size:
            self._drop(uid, phase)
            self._complete(uid, phase, [of.messages[rank] for rank in range(self._world_size)])
        elif not self._lacks_gone(uid, phase, of) and phase in MEETINGS and of.deadline is None:
            loop = asyncio.get_running_loop()
            of.deadline = loop.call_later(self._timeout, self._late, uid)

    def _differs(self, rank: int, uid: str, ordinal: int, name: str, phase: str) -> bool:
        """Whether ranks do different things under one ordinal, which can never meet."""
        names = self._names.setdefault(ordinal, {})
        if _kind(phase) in _OF_LOADS:
            did = "called load()"
        else:
            did = "called latest()" if phase == "latest" else f"saved {name!r}"
        names.setdefault(did, (uid, set()))[1].add(rank)
        while len(self._names) > REMEMBERED:
            self._names.popitem(last=False)
        if len(names) == 1:
            return False
        told = ", ".join(f"{name_ranks(sorted(ranks))} {did}" for did, (_, ranks) in names.items())
        error = RemoteError(
            phase=phase,
            type_name="EngineStateError",
            message=f"the ranks do not save the same: as call number {ordinal} of the engine {told}. "
            "All ranks have to save (and load) the same checkpoints in the same order",
        )
        everybody = {rank: error for _, ranks in names.values() for rank in ranks}
        for other, _ in names.values():
            self.fail(other, everybody)
        return True

    def _lacks_gone(self, uid: str, phase: str, of: _Round) -> bool:
        gone = {rank: reason for rank, reason in self.gone.items() if rank not in of.messages}
        if gone:
            self.fail(
                uid,
                {
                    rank: RemoteError(phase=phase, type_name="EngineStateError", message=reason)
                    for rank, reason in gone.items()
                },
            )
        return bool(gone)

    def fail(self, uid: str, failures: dict[int, RemoteError], *, reporter: int | None = None) -> None:
        """``uid`` failed; all are told, at once or when the decision in progress has been sent."""
        if uid in self._held:
            self._held[uid].failures.append((failures, reporter))
        elif not self._waiters.is_over(uid):
            self._noted(uid, failures)
            if self._waiters.failure(uid) is not None:
                return
            for phase in [phase for other, phase in self._rounds if other == uid]:
                self._drop(uid, phase)
            self._failed(uid, failures, reporter)

    @contextmanager
    def deciding(self, uid: str, phase: str) -> Iterator[None]:
        """The coordinator decides on ``uid``. What is raised inside fails it, before failures that came
        meanwhile."""
        held = self._held.setdefault(uid, _Held())
        held.depth += 1
        try:
            yield
        except BaseException as error:
            held.failures.insert(0, ({self._rank: RemoteError.of(phase, error)}, self._rank))
            raise
        finally:
            held.depth -= 1
            if not held.depth:
                del self._held[uid]
                for failures, reporter in held.failures:
                    self.fail(uid, failures, reporter=reporter)

    def missing(self, uid: str) -> dict[int, RemoteError]:
        """Who has not begun ``uid``; empty if nobody waits for that any more."""
        for phase, verb in MEETINGS.items():
            if (of := self._rounds.get((uid, phase))) is not None:
                what = f"{verb} of {of.name!r}" if phase == "verdict" and of.name else verb
                late = f"did not call {what} within {self._timeout:g} s of the first rank"
                lacking = [rank for rank in range(self._world_size) if rank not in of.messages]
                return {
                    rank: RemoteError(
                        phase=phase,
                        type_name="TimeoutError",
                        message=f"rank {rank} {late}"
                        + (f": it {self._doing(rank)}" if rank in self._busy else ""),
                    )
                    for rank in lacking
                }
        return {}

    def busy(self, rank: int, found: tuple[str, float] | None) -> None:
        """``rank`` has been in some code of the trainer's for some seconds, or is not any more."""
        if found is None:
            self._busy.pop(rank, None)
        else:
            self._busy[rank] = (found[0], asyncio.get_running_loop().time() - found[1])
        self.check_busy()

    def check_busy(self) -> None:
        """Fail what waits for ranks that have been in the trainer's code for too long. Phases that have a
        deadline of their own name them when it is over."""
        if not self._busy:
            return
        now = asyncio.get_running_loop().time()
        late = {rank for rank, (_, since) in self._busy.items() if now - since >= self._timeout}
        for (uid, phase), of in list(self._rounds.items()):
            if _kind(phase) in _AFTER_USER_CODE and (lacking := late - of.messages.keys()):
                failures = {
                    rank: RemoteError(
                        phase=phase, type_name="TimeoutError", message=f"rank {rank} {self._doing(rank)}"
                    )
                    for rank in lacking
                }
                self.fail(uid, failures)

    def _doing(self, rank: int) -> str:
        text, since = self._busy[rank]
        return f"is in {text} since {asyncio.get_running_loop().time() - since:.0f} s"

    def begun(self, uid: str) -> tuple[int | None, str]:
        """The ordinal and name of ``uid``, which ranks wait to begin."""
        return next((of.ordinal, of.name) for (other, _), of in self._rounds.items() if other == uid)

    def lacking(self, ranks: set[int]) -> set[str]:
        """The uids that wait for a message of one of ``ranks``."""
        return {uid for (uid, _), of in self._rounds.items() if not ranks <= set(of.messages)}

    def silent(self, uid: str, ranks: set[int], why: str) -> dict[int, RemoteError]:
        """What to say of ``ranks`` in ``uid``; ``why`` is what they have not done."""
        reached = self._reached.get(uid, {})
        waited_for = next((phase for other, phase in self._rounds if other == uid), "open")
        return {rank: stopped(rank, why, reached.get(rank), waited_for) for rank in ranks}

    def goodbye(self, rank: int, reason: str) -> None:
        """``rank`` takes part in nothing any more, but for what it sent already."""
        self.gone[rank] = reason
        for (uid, phase), of in list(self._rounds.items()):
            if (uid, phase) in self._rounds:
                self._lacks_gone(uid, phase, of)

    def leave(self, reason: str) -> None:
        """The coordinator takes part in nothing any more."""
        self.gone[self._rank] = reason
        for uid, phase in list(self._rounds):
            self.fail(
                uid, {self._rank: RemoteError(phase=phase, type_name="EngineStateError", message=reason)}
            )

    def forget(self, uid: str) -> None:
        """``uid`` is over on the coordinator; ranks that wait for it still are told so. To be called before
        ``is_over`` says so."""
        self._reached.pop(uid, None)
        phases = [phase for other, phase in self._rounds if other == uid]
        if phases:
            self.fail(uid, {self._rank: unanswered(self._rank, phases[0])})

    def close(self) -> None:
        """Drop everything, tell nobody."""
        for uid, phase in list(self._rounds):
            self._drop(uid, phase)

    def _drop(self, uid: str, phase: str) -> None:
        of = self._rounds.pop((uid, phase))
        if of.deadline is not None:
            of.deadline.cancel()


def unanswered(rank: int, phase: str) -> RemoteError:
    """The coordinator went on without the others."""
    return RemoteError(
        phase=phase,
        type_name="EngineStateError",
        message=f"rank {rank} ended this save without an answer to the others",
    )


def stopped(rank: int, why: str, reached: str | None, waited_for: str) -> RemoteError:
    """``rank`` is silent; ``reached`` is the phase that it was last heard of in, if it was."""
    told = f"it was last heard of in phase {reached!r}" if reached else f"its {waited_for!r} was waited for"
    return RemoteError(
        phase=reached or waited_for, type_name="TimeoutError", message=f"rank {rank} {why}; {told}"
    )


def stood_still(rank: int, phase: str, seconds: float) -> RemoteError:
    """The coordinator itself was the silent one."""
    return RemoteError(
        phase=phase,
        type_name="TimeoutError",
        message=f"rank {rank} stood still for {seconds:g} s, so other ranks may have given up on it",
    )
