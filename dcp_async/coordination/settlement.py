"""One outcome for all: who failed in a save or load, told to every rank in the same words.

Enters: failures as the coordinator hears of them, and each rank's word that it has stopped. Leaves: a verdict
per uid, the same for whoever asks, also later. Invariant: a verdict is made once, when each rank has failed,
stopped or gone, or a moment after the first failure, since one that hangs must not keep the others from their
errors; what is not known by then is not in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from .failures import RemoteError
from .messages import Send, Settled, Stopped
from .recent import REMEMBERED, Recent

Verdict = tuple[dict[int, RemoteError], bool]
"""What each rank failed at, and whether any rank had gone past the point that it told of."""


@dataclass(slots=True, kw_only=True)
class _Open:
    deadline: float
    failures: dict[int, RemoteError] = field(default_factory=dict)
    stopped: dict[int, bool] = field(default_factory=dict)


class Settlement:
    """The coordinator's table of what failed; times are seconds of one clock, given with each call."""

    def __init__(self, *, world_size: int, patience: float) -> None:
        """``patience``: seconds from the first word of a failure to its verdict, at most."""
        self._world_size, self._patience = world_size, patience
        self._gone: set[int] = set()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._made: Recent[str, Settled] = Recent()

    def __repr__(self) -> str:
        return f"<Settlement open={list(self._open)}>"

    def failed(self, uid: str, failures: Mapping[int, RemoteError], now: float) -> list[Send]:
        """These ranks failed; the first word of each counts."""
        if uid in self._made:
            return []
        case, told = self._begun(uid, now)
        # the first word is the cause: what a rank says after others' failures follows from them
        for rank, error in failures.items():
            case.failures.setdefault(rank, error)
        return told + self._decide_if_known(uid, case)

    def stopped(self, word: Stopped, now: float) -> list[Send]:
        """A rank has ended its part of a uid that failed, and wants to know how it ended for all."""
        if word.uid in self._made:
            return [Send(rank=word.rank, message=self._made[word.uid])]
        case, told = self._begun(word.uid, now)
        case.stopped[word.rank] = word.flag
        return told + self._decide_if_known(word.uid, case)

    def gone(self, rank: int) -> list[Send]:
        """``rank`` takes part in nothing any more."""
        self._gone.add(rank)
        told: list[Send] = []
        for uid, case in list(self._open.items()):
            told += self._decide_if_known(uid, case)
        return told

    def tick(self, now: float) -> list[Send]:
        """What is due by ``now``."""
        told: list[Send] = []
        for uid in [uid for uid, case in self._open.items() if case.deadline <= now]:
            told += self._decide(uid)
        return told

    def deadlines(self) -> list[float]:
        """When ``tick`` has to be called."""
        return [case.deadline for case in self._open.values()]

    def _begun(self, uid: str, now: float) -> tuple[_Open, list[Send]]:
        told: list[Send] = []
        case = self._open.get(uid)
        if case is None:
            case = self._open[uid] = _Open(deadline=now + self._patience)
            # whoever never stops must not make this grow: the oldest is decided by what is known
            while len(self._open) > REMEMBERED:
                told += self._decide(next(iter(self._open)))
        return case, told

    def _decide_if_known(self, uid: str, case: _Open) -> list[Send]:
        # a rank that failed may say so again as one that stopped: it is waited for once
        heard = case.failures.keys() | case.stopped.keys() | self._gone
        return self._decide(uid) if len(heard) >= self._world_size else []

    def _decide(self, uid: str) -> list[Send]:
        case = self._open.pop(uid)
        verdict = Settled(
            uid=uid, failures=dict(sorted(case.failures.items())), flag=any(case.stopped.values())
        )
        # kept for ranks that stop later: they get these words, not what is known by then
        self._made[uid] = verdict
        return [Send(rank=rank, message=verdict) for rank in case.stopped]
