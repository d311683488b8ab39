"""What an engine is made with, and what it has while it is open.

Enters: the constructor's arguments. Leaves: two frozen values, ``Setup`` from the start, ``Resources`` once
the engine opens; saves and loads borrow from the second and end nothing of it. Invariant: each thing that an
engine has is kept here alone, and who closes it is known from the start.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads, LoopThread
from ..catalog import Catalog, PathOpener, Retention
from ..coordination import Coordination, Coordinator
from ..events import Event, Observer
from ..formats import Format
from ..options import Limits, Timeouts
from ..planning import PlanningOptions
from ..schedule import SavePolicy
from ..staging import Stager, StagingOptions
from ..storage import (
    BlockingCalls,
    LimitedStorage,
    LocalStorage,
    MemoryStorage,
    Storage,
    TieredStorage,
    gives_public_names,
    is_sharing,
    storage_at,
)
from ..trust import Trust

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """An engine's parts and options. Of storage and stager, what was given stays the caller's to close."""

    storage: Storage
    memory: MemoryStorage | None
    """The storage that was named or given, where it is this process's memory."""
    tiered: TieredStorage | None
    """The storage that was given, where it has a far tier."""
    owns_storage: bool
    stager: Stager
    owns_stager: bool
    planning: PlanningOptions
    format: Format
    coordination: Coordination
    limits: Limits
    timeouts: Timeouts
    trust: Trust
    observer: Observer | None
    policy: SavePolicy | None
    retention: Retention | None
    is_reader: bool
    """Whether nothing will be saved, or only under given names, so that nobody has to know the steps."""

    @property
    def configuration(self) -> str:
        """What ranks have to configure alike, since they wait for each other."""
        # by name: it is compared with those of other processes, where the class is another object
        planners = [
            getattr(factory, "__qualname__", type(factory).__qualname__)
            for factory in (self.planning.save, self.planning.load)
        ]
        return (
            f"pending_saves={self.limits.pending_saves} overlap={self.stager.options.overlap} "
            f"planner={planners[0]} load_planner={planners[1]} replicas={self.coordination.replicas} "
            f"policy={self.policy!r}"
        )

    def check_ranks(self, world_size: int) -> None:
        """Raises: StorageError where several ranks would write to what only one of them sees; ValueError for
        a format of files that all ranks write where the storage has none."""
        if self.format.shares_files and not gives_public_names(self.storage):
            raise ValueError(
                f"format={self.format!r} gives files names that others look for, which {self.storage!r} does "
                "not: save to a directory, and copy what is published from there"
            )
        if self.format.shares_files and world_size > 1 and not is_sharing(self.storage):
            raise ValueError(
                f"format={self.format!r} has all {world_size} ranks write into the same files, which "
                f"{self.storage!r} does not allow: save to a directory that all ranks see, or gather the "
                "weights (get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
                "cpu_offload=True))) and save them on rank 0 alone, by an engine with "
                "Coordination(mode='local')"
            )
        if self.memory is not None and world_size > 1:
            self.memory.refuse_ranks()


def make_setup(
    root: Storage | str | os.PathLike[str],
    staging: Stager | StagingOptions,
    *,
    planning: PlanningOptions,
    format: Format,
    coordination: Coordination,
    limits: Limits,
    timeouts: Timeouts,
    trust: Trust,
    observer: Observer | None,
    policy: SavePolicy | None = None,
    retention: Retention | None = None,
    is_reader: bool = False,
) -> Setup:
    """A storage and a stager are made where paths, URLs and options were given. Raises TypeError for a root
    that is neither a path nor a storage, a policy that is none, or a format that is none; ValueError for a
    URL that no storage serves."""
    if policy is not None and not isinstance(policy, SavePolicy):
        raise TypeError(f"policy={policy!r} must be a SavePolicy: Every, Adaptive, OnSignal, joined with |")
    if not isinstance(retention, Retention | None):
        raise TypeError(f"retention={retention!r} must be a policy such as KeepLatest(3), or several, a | b")
    # by a method: one of somebody else's need not derive from a class of ours
    if not hasattr(format, "layout"):
        raise TypeError(f"format={format!r} must be a Format, as SafetensorsFormat() is")
    owns_storage = isinstance(root, (str, os.PathLike))
    storage = _storage_of(root, limits, timeouts, trust)
    # one that was given is wrapped by now
    memory = storage if isinstance(storage, MemoryStorage) else root
    return Setup(
        storage=storage,
        memory=memory if isinstance(memory, MemoryStorage) else None,
        tiered=root if isinstance(root, TieredStorage) else None,
        owns_storage=owns_storage,
        stager=staging if isinstance(staging, Stager) else Stager(staging),
        owns_stager=not isinstance(staging, Stager),
        planning=planning,
        format=format,
        coordination=coordination,
        limits=limits,
        timeouts=timeouts,
        trust=trust,
        observer=observer,
        policy=policy,
        retention=retention,
        is_reader=is_reader,
    )


def _storage_of(
    root: Storage | str | os.PathLike[str], limits: Limits, timeouts: Timeouts, trust: Trust
) -> Storage:
    """See ``make_setup``."""
    if isinstance(root, (str, os.PathLike)):
        return storage_at(
            root,
            io_concurrency=limits.io_concurrency,
            timeout=timeouts.storage,
            lease_max_age=2 * timeouts.coordination,
            follow_links=trust.follow_links,
        )
    if not hasattr(root, "begin"):
        raise TypeError(f"root={root!r} must be a directory's path (str or PathLike), a URL or a Storage")
    # a storage of the user's promises no end of its calls
    return LimitedStorage(root, timeouts.storage)


def make_calls(setup: Setup) -> BlockingCalls:
    """Where calls run that look at paths: the storage's own threads, if it has such, else others that start
    with the first path."""
    if isinstance(setup.storage, LocalStorage):
        return setup.storage
    # nothing starts before a path is asked for
    return BlockingCalls(io_concurrency=setup.limits.io_concurrency, timeout=setup.timeouts.storage)


def make_catalog(
    setup: Setup,
    threads: BlockingThreads,
    calls: BlockingCalls,
    metadata_of: Callable[[str], Awaitable[Metadata]],
) -> Catalog:
    """What chooses among the checkpoints of ``setup``, and opens paths."""
    storage, timeout = setup.storage, setup.timeouts.storage

    def paths(root: str) -> PathOpener:
        return PathOpener(root, calls, threads, metadata_of, timeout=timeout, trust=setup.trust)

    opener = None
    if setup.is_reader and isinstance(storage, LocalStorage):
        opener = paths(os.fspath(storage.root))  # who asks for one directory means whatever lies there
    return Catalog(storage, threads, metadata_of, timeout=timeout, paths=paths("/"), opener=opener)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resources:
    """What an open engine has. Made by its Lifetime, which also ends it; serves as SaveServices."""

    setup: Setup
    coordinator: Coordinator
    loop: LoopThread
    """Runs the engine's coroutines."""
    threads: BlockingThreads
    """For hashing, planning and decoding."""
    calls: BlockingCalls
    """For looking at paths outside of the root; the storage itself, if that has threads for it."""
    catalog: Catalog

    @property
    def storage(self) -> Storage:
        return self.setup.storage

    @property
    def stager(self) -> Stager:
        return self.setup.stager

    @property
    def planning(self) -> PlanningOptions:
        return self.setup.planning

    @property
    def format(self) -> Format:
        return self.setup.format

    @property
    def io_concurrency(self) -> int:
        """How many reads or writes go on at once."""
        return self.setup.limits.io_concurrency

    @property
    def pending_saves(self) -> int:
        """How many saves may be in flight."""
        return self.setup.limits.pending_saves

    @property
    def timeout(self) -> float:
        """Seconds that one blocking call may take."""
        return self.setup.timeouts.storage

    def abandon(self) -> None:
        """Calls that hang are not waited for any more."""
        self.storage.abandon()
        self.calls.abandon()
        self.threads.abandon()
        self.coordinator.abandon()
        if self.setup.owns_stager:
            self.stager.abandon()

    async def release_storage(self) -> None:
        """Close what was made to reach storage; what was given stays open."""
        if self.setup.owns_storage:
            await self.storage.close()
        # else it is the storage itself, which may be somebody else's
        if not isinstance(self.calls, LocalStorage):
            await self.calls.close()

    def observe(self, event: Event) -> None:
        """Tell the observer, if there is one; what it raises is logged and goes no further."""
        observer = self.setup.observer
        if observer is None:
            return
        try:
            observer.on_event(event)
        except BaseException:
            # of the user's code, on the engine's thread: a CancelledError or GeneratorExit would pass for the
            # save's own, and a SystemExit would end the loop with all saves on it.
            # formatted here: a record that kept the frames would keep what they refer to
            logger.error("the observer failed on %s\n%s", type(event).__name__, traceback.format_exc())
