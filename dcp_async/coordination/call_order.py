"""Whether all ranks make the same calls in the same order, without which they never meet.

Enters: the first contributions of each call. Leaves: what differs. Invariant: a call is known by its ordinal,
which every rank counts for itself; only the newest few hundred are compared, since later messages of older
ones are those of saves in flight, which were compared when they began.
"""

from __future__ import annotations

from .failures import RemoteError, name_ranks
from .messages import Contribution
from .phases import describe_call
from .recent import Recent


class CallOrder:
    """The coordinator's table of calls."""

    def __init__(self) -> None:
        self._calls: Recent[int, dict[str, tuple[str, set[int]]]] = Recent()
        """Ordinal -> what ranks did -> (uid of that, which ranks)."""

    def compare(self, sent: Contribution) -> tuple[list[str], dict[int, RemoteError]]:
        """The uids that can never meet, and what to say of the ranks; nothing where ranks agree so far."""
        if sent.ordinal is None:  # a save of long ago, whose beginning was compared
            return [], {}
        calls = self._calls.setdefault(sent.ordinal, {})
        done = describe_call(sent.phase, sent.name)
        calls.setdefault(done, (sent.uid, set()))[1].add(sent.rank)
        if len(calls) == 1:
            return [], {}
        told = ", ".join(f"{name_ranks(sorted(ranks))} {what}" for what, (_, ranks) in calls.items())
        error = RemoteError(
            phase=sent.phase,
            type_name="EngineStateError",
            message=f"the ranks do not save the same: as call number {sent.ordinal} of the engine {told}. "
            "All ranks have to save (and load) the same checkpoints in the same order",
        )
        # all of them, for nobody can tell which rank has it right
        failures = {rank: error for _, ranks in calls.values() for rank in ranks}
        return [uid for uid, _ in calls.values()], failures
