"""The engines' names, in the order of the tables, and what a run must know of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a run must know of an engine."""

    held: float
    """How many times the state its processes may hold at their peak, the state itself included."""
    asynchronous: bool = True
    """Whether a save goes on after its call has returned."""
    loads: bool = False
    """Whether its loads are timed: one of all that load by the same code. Each is checked."""
    slow_many: bool = False
    """Whether a save of thousands of tensors takes seconds: then it gets the fewest rounds."""
    mark: Literal["", "*"] = ""
    """`*`: synced from outside."""


RAW = "raw"
OURS = "dcp_async"
STOCK = "stock"
ENGINES: Mapping[str, Traits] = {
    RAW: Traits(held=2.0, asynchronous=False, loads=True),
    OURS: Traits(held=2.0, loads=True),
    "dcp_async overlap": Traits(held=2.0),
    "dcp_async 128 MiB": Traits(held=1.15),
    STOCK: Traits(held=2.0, loads=True, slow_many=True),
    "stock best": Traits(held=2.0, slow_many=True),
    "stock best overlap": Traits(held=2.0, slow_many=True),
    "stock process": Traits(held=3.0, slow_many=True),
    "stock process best": Traits(held=3.0, slow_many=True),
    "stock sync": Traits(held=1.1, asynchronous=False, slow_many=True),
    "stock sync best": Traits(held=1.1, asynchronous=False, slow_many=True),
    "torch.save": Traits(held=1.1, asynchronous=False, loads=True, mark="*"),
    "safetensors": Traits(held=2.0, asynchronous=False, loads=True, mark="*"),
    "torch-checkpointing": Traits(held=2.2, loads=True, mark="*"),
    "torchsnapshot": Traits(held=2.2, loads=True, mark="*"),
}
CORE = (RAW, OURS, STOCK, "stock best")
"""Measured first and together: what the goals compare."""
OTHERS = tuple(engine for engine in ENGINES if engine not in CORE)
PREPARED = "dcp_async prepared"
ON_DEVICES = (RAW, OURS, PREPARED, "dcp_async overlap", "stock pinned", "stock pinned overlap")
"""Measured where the state is on an accelerator: stock at its best there, with one stager for all saves; ours
also with its first save prepared."""
TRAINER_CORE = (OURS, "dcp_async overlap", STOCK, "stock best")
TRAINER_OTHERS = (OURS, "stock process best", "torch-checkpointing", "torchsnapshot")
PROCESS_BYTES = 400 << 20
"""An engine's process without the state: interpreter, torch, the engine."""


def memory_needed(engines: Sequence[str], state_bytes: int) -> int:
    """Bytes that the processes of these engines may hold together."""
    return sum(PROCESS_BYTES + int(ENGINES[engine].held * state_bytes) for engine in engines)


def groups_that_fit(engines: Sequence[str], state_bytes: int, room: int) -> list[list[str]]:
    """Who is measured side by side: as many a group as fit into `room` bytes.

    Ours is in each group, since no ratio leaves a group. An engine that does not fit beside ours is a group
    of its own, which the caller reports as too large.
    """
    groups = [[OURS]]
    for engine in engines:
        if len(groups[-1]) > 1 and memory_needed([*groups[-1], engine], state_bytes) > room:
            groups.append([OURS])
        groups[-1].append(engine)
    return groups
