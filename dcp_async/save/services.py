"""What saves borrow from the engine, and what they leave to those after them.

Lent things live as long as the engine, and it alone ends them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import anyio

from .._concurrency import BlockingThreads
from ..coordination import Coordinator
from ..events import Event
from ..formats import Format
from ..planning import CompiledPlan, PlanningOptions
from ..staging import Stager
from ..state import KnownStructure
from ..storage import Storage, Transaction
from .replica_check import ReplicaCheck


class SaveServices(Protocol):
    """What an engine lends to its saves. Pool slots are reserved in its name."""

    @property
    def stager(self) -> Stager: ...

    @property
    def storage(self) -> Storage: ...

    @property
    def coordinator(self) -> Coordinator: ...

    @property
    def threads(self) -> BlockingThreads: ...

    @property
    def planning(self) -> PlanningOptions: ...

    @property
    def format(self) -> Format: ...

    @property
    def io_concurrency(self) -> int: ...

    @property
    def pending_saves(self) -> int: ...

    @property
    def timeout(self) -> float:
        """Seconds that one blocking call may take."""

    def observe(self, event: Event) -> None: ...


@dataclass(slots=True, kw_only=True)
class Carryover:
    """What the saves of an engine leave to those after them."""

    replicas: ReplicaCheck
    latest: tuple[CompiledPlan, KnownStructure] | None = None
    """The newest plan, for saves whose structure is the same, and what makes their capture fast. One value:
    the loop sets it, callers' threads read it."""
    unfinished: list[Transaction] = field(default_factory=list)
    """Transactions whose abort failed."""
    publishing: anyio.Lock = field(default_factory=anyio.Lock)
    """Held by the save that makes what all saves of a plan publish; others in flight wait for it."""
