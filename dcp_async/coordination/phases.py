"""What the coordinator knows of the phases that saves and loads name: which have a deadline, and which wait
for the trainer's code.

A phase that there may be several of ends in a number, "leaves 2", which says nothing about its kind.
"""

from __future__ import annotations

MEETINGS = {"verdict": "save()", "choose": "load()", "latest": "latest()", "remove": "remove()"}
"""Verbs of the engine, by their first phase. In it all ranks have to arrive within a time of the first: later
ones take as long as writing or reading takes."""
_AFTER_USER_CODE = frozenset({"ask", "reads", "unexpected", "restore"})
_LOADS = frozenset({"choose", "open", "ask", "reads", "unexpected", "ready", "done", "restore"})


def _kind(phase: str) -> str:
    return phase.partition(" ")[0]


def follows_user_code(phase: str) -> bool:
    """Whether a rank arrives in it when its ``state_dict()`` or ``load_state_dict()`` has returned."""
    return _kind(phase) in _AFTER_USER_CODE


def describe_call(phase: str, name: str) -> str:
    """What a rank that is in ``phase`` of ``name`` did: "saved 'step-3'"."""
    # by verb alone: the coordinator chooses what is loaded, whatever the references of others say
    if _kind(phase) in _LOADS:
        return "called load()"
    return f"called {phase}()" if phase in ("latest", "remove") else f"saved {name!r}"
