"""One outcome for all: who failed in a save or load, told to every rank in the same words.

Enters: failures as the coordinator hears of them, and each rank's word that it has stopped. Leaves: a verdict
per uid, the same for whoever asks, also later. Invariant: a verdict is made once, when each rank has failed,
stopped or gone, or a moment after the first failure, since one that hangs must not keep the others from their
errors; what is not known by then is not in it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .failures import RemoteError
from .waiters import REMEMBERED

Verdict = tuple[dict[int, RemoteError], bool]
"""What each rank failed at, and whether any rank had gone past the point that it told of."""


@dataclass(slots=True)
class _Open:
    failures: dict[int, RemoteError] = field(default_factory=dict)
    stopped: dict[int, bool] = field(default_factory=dict)
    deadline: asyncio.TimerHandle | None = None


class Settlement:
    """The coordinator's books; all of it belongs to the engine's loop."""

    def __init__(
        self,
        *,
        world_size: int,
        patience: float,
        tell: Callable[[int, str, Verdict], object],
        gone: Mapping[int, str],
    ) -> None:
        """``tell`` is given a rank, a uid and its verdict; ``gone`` has the ranks that closed their engine;
        ``patience`` in seconds."""
        self._world_size, self._patience, self._tell, self._gone = world_size, patience, tell, gone
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._made: OrderedDict[str, Verdict] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Settlement open={list(self._open)}>"

    def failed(self, uid: str, failures: Mapping[int, RemoteError]) -> None:
        """These ranks failed; the first word of each counts."""
        if uid not in self._made:
            of = self._begun(uid)
            for rank, error in failures.items():
                of.failures.setdefault(rank, error)
            self._look(uid, of)

    def stopped(self, rank: int, uid: str, flag: bool) -> None:
        """``rank`` has ended its part of a uid that failed, and wants to know how it ended for all."""
        if uid in self._made:
            self._tell(rank, uid, self._made[uid])
        else:
            of = self._begun(uid)
            of.stopped[rank] = flag
            self._look(uid, of)

    def _begun(self, uid: str) -> _Open:
        of = self._open.get(uid)
        if of is None:
            of = self._open[uid] = _Open()
            of.deadline = asyncio.get_running_loop().call_later(self._patience, self._decide, uid)
            while len(self._open) > REMEMBERED:
                self._decide(next(iter(self._open)))
        return of

    def _look(self, uid: str, of: _Open) -> None:
        if len(of.failures.keys() | of.stopped.keys() | self._gone.keys()) >= self._world_size:
            self._decide(uid)

    def _decide(self, uid: str) -> None:
        of = self._open.pop(uid)
        assert of.deadline is not None
        of.deadline.cancel()
        verdict = self._made[uid] = (dict(sorted(of.failures.items())), any(of.stopped.values()))
        while len(self._made) > REMEMBERED:
            self._made.popitem(last=False)
        for rank in of.stopped:
            self._tell(rank, uid, verdict)

    def close(self) -> None:
        """Nobody is told any more."""
        for of in self._open.values():
            if of.deadline is not None:
                of.deadline.cancel()
        self._open.clear()
