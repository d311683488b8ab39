"""Who waits on this rank for which answer, and which saves and loads failed or are over here.

Enters: answers and failures by uid. Leaves: the answer, or one RemoteFailure for everybody who waits for that
uid, now or later. Invariant: all of it belongs to the engine's loop; what nobody asks for any more is
forgotten, so memory is bounded by the saves in flight and a few hundred ids.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import EngineStateError
from .failures import RemoteError, RemoteFailure
from .recent import Recent


@dataclass(frozen=True, slots=True)
class KnownFailure:
    """A failed uid. ``common``: the coordinator said so, hence every rank knows or will."""

    failures: Mapping[int, RemoteError]
    common: bool


class Waiters:
    """Who waits on this rank, by uid."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[object, asyncio.Future[Callable[[], Any]]]] = {}
        self._failed: Recent[str, KnownFailure] = Recent()
        self._over: Recent[str, None] = Recent()
        self._ended: Callable[[], EngineStateError] | None = None

    def __repr__(self) -> str:
        return f"<Waiters {list(self._waiting)} failed={list(self._failed)[-3:]}>"

    @property
    def uids(self) -> list[str]:
        """The uids that somebody waits for."""
        return list(self._waiting)

    @property
    def num_remembered(self) -> int:
        """Entries that must not grow with saves that are over."""
        return len(self._waiting) + len(self._failed)

    def phase(self, uid: str) -> str | None:
        """Which answer is waited for."""
        return next((key for key in self._waiting.get(uid, ()) if isinstance(key, str)), None)

    @contextmanager
    def waiting(self, uid: str, phase: str | None) -> Iterator[asyncio.Future[Callable[[], Any]]]:
        """A future for the answer of ``phase``, or, with None, for a failure alone: a call of its result
        returns or raises. Raises at once what is known already."""
        self.check(uid)
        mine = self._waiting.setdefault(uid, {})
        # any number may wait for a failure alone, one for an answer: two would be two messages of one rank
        key = object() if phase is None else phase
        if key in mine:
            raise ValueError(f"an exchange of {uid} in phase {phase!r} is under way on this rank")
        answer: asyncio.Future[Callable[[], Any]] = asyncio.get_running_loop().create_future()
        mine[key] = answer
        try:
            yield answer
        finally:
            # also when cancelled: an answer that comes now must find nobody, so that the coordinator is asked
            # to fail what it can't hand over
            del mine[key]
            if not mine:
                self._waiting.pop(uid, None)

    def check(self, uid: str) -> None:
        """Raises what whoever waits for ``uid`` would be told at once."""
        if self._ended is not None:
            raise self._ended()
        if (known := self._failed.get(uid)) is not None:
            raise RemoteFailure(known.failures)

    def answer(self, uid: str, phase: str, call: Callable[[], Any]) -> bool:
        """Wake who waits for ``phase``, if anybody does; a call of ``call`` gives the answer or raises."""
        waiter = self._waiting.get(uid, {}).get(phase)
        # one that was woken by a failure a moment ago stays failed, whatever it is sent now
        if waiter is None or waiter.done():
            return False
        waiter.set_result(call)
        return True

    def failure(self, uid: str) -> KnownFailure | None:
        """What is known of a failed uid."""
        return self._failed.get(uid)

    def is_over(self, uid: str) -> bool:
        return uid in self._over

    def fail(self, uid: str, failures: Mapping[int, RemoteError], *, common: bool) -> None:
        """Wake all who wait for ``uid``, and whoever comes later. The first failure stays."""
        if uid in self._over:
            return
        known = self._failed.get(uid)
        # what this rank was told first stays its reason; that all ranks know of a failure is news of its own,
        # since then nobody has to be told of it any more
        if known is None or (common and not known.common):
            self._failed[uid] = KnownFailure(known.failures if known else failures, common)
        if known is None:
            for waiter in self._waiting.get(uid, {}).values():
                if not waiter.done():
                    waiter.set_result(raiser(lambda: RemoteFailure(failures)))

    def end(self, error: Callable[[], EngineStateError]) -> None:
        """From here on every wait raises. The first reason stays."""
        if self._ended is None:
            self._ended = error
            for mine in self._waiting.values():
                for waiter in mine.values():
                    if not waiter.done():
                        waiter.set_result(raiser(error))

    def forget(self, uid: str) -> None:
        """``uid`` is over; what still arrives for it is dropped."""
        self._failed.pop(uid, None)
        self._over[uid] = None


def raiser(error: Callable[[], BaseException]) -> Callable[[], Any]:
    """A call that raises a fresh error: one that is raised to many waiters would grow with each of them."""

    def call() -> Any:
        raise error()

    return call
