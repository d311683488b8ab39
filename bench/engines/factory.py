"""Which adapter has which name.

In: a name of `roster.ENGINES`. Out: an `Engine`, not yet open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .adapter import Engine

BUDGET_BYTES = 128 << 20


def make(name: str, state: dict[str, Any], root: Path, *, joined: bool = False) -> Engine:
    """The adapter of that name, not yet open; imports its engine.

    `joined`: a process group of several ranks is there already, and stock is to use it; ours finds it.
    """
    # Not at the top: a process imports the engine that it measures and no other.
    match name.split(" "):
        case ["dcp_async", *options]:
            from .ours import DcpAsync

            budget = BUDGET_BYTES if "128" in options else None
            return DcpAsync(state, root, overlap="overlap" in options, budget=budget)
        case ["stock", *options]:
            from .stock import Stock

            return Stock(
                state,
                root,
                how="sync" if "sync" in options else "process" if "process" in options else "thread",
                best="best" in options or "pinned" in options,
                pinned="pinned" in options,
                overlap="overlap" in options,
                joined=joined,
            )
        case [peer]:
            from .peers import PEERS

            return PEERS[peer](state, root)
    raise ValueError(f"no engine named {name!r}")
