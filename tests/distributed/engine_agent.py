"""What runs in each process of a world of engines: an agent with verbs over a real CheckpointEngine.

Enters: verbs, and what shall go wrong at which point of the next save or load. Leaves: outcomes as plain
dicts, errors taken apart, because a rank's own exception may not pickle.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dcp_async import (
    CheckpointEngine,
    Coordination,
    KeepLatest,
    Limits,
    PerRank,
    StagingOptions,
    Timeouts,
    Trust,
)
from dcp_async.errors import CheckpointError, LoadError, SaveError
from dcp_async.formats import DistcpFormat, SafetensorsFormat
from dcp_async.storage.local import lease
from dcp_async.storage.local.storage import LocalStorage
from tests.distributed.agent import Agent, LocalError
from tests.support.doubles import FaultyStorage, Gate, _Fault, difference

Outcome = dict[str, Any]

BIG = 40_000
"""Elements of a tensor that overlap=True does not set aside within capture()."""
HUGE = 200_000
"""Elements of a tensor in which a whole block of checksums lies, so that nobody else reads that."""

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all",
    "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list",
    "gather", "gather_object", "irecv", "isend", "monitored_barrier", "new_group", "recv", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
)  # fmt: skip

FAILURES: dict[str, Callable[[], Exception]] = {
    "disk": lambda: OSError(28, "No space left on device"),
    "memory": lambda: MemoryError("cannot allocate"),
    "unpicklable": lambda: LocalError("only here", asyncio.Lock()),
    "unreadable": lambda: OSError(5, "Input/output error"),
    "missing": lambda: FileNotFoundError(2, "No such file or directory"),
}


class Logged(logging.Handler):
    """Keeps what was logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Foreign:
    """A leaf that no Trust allows by default."""

    def __eq__(self, other: object) -> bool:
        return type(other) is Foreign

    __hash__ = None  # type: ignore[assignment]  # equal by type, never a key


class Trap:
    """A Stateful that does what it is told when it is asked for its state, which a load does for the memory
    that it holds."""

    def __init__(self) -> None:
        self.harmless = torch.ones(1)
        self.act: Callable[[], None] = lambda: None
        self.act_on_load: Callable[[], None] = lambda: None

    def state_dict(self) -> dict[str, Any]:
        self.act()
        return {"harmless": self.harmless}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.act_on_load()


def replicated(value: int) -> dict[str, torch.Tensor]:
    """What all ranks hold alike: enough tensors that every rank writes some."""
    return {f"w{at}": torch.arange(BIG, dtype=torch.float32) + value + at for at in range(4)}


def own(rank: int, value: int) -> dict[str, Any]:
    """What only ``rank`` holds, writes and reads."""
    return {"seen": value * 1000 + rank, "noise": torch.full((HUGE,), float(value * 10 + rank))}


def whole(size: int, value: int) -> dict[str, Any]:
    """What ``read`` gives back of a checkpoint of ``size`` ranks."""
    return {
        "model": replicated(value),
        "count": value,
        "own": {PerRank.key(rank): own(rank, value) for rank in range(size)},
        "trap": {"harmless": torch.ones(1)},
    }


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL can't be caught")


def described(error: BaseException) -> Outcome:
    failures = error.failures if isinstance(error, SaveError) else {}
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "phase": getattr(error, "phase", None),
        "failures": {
            rank: (getattr(each, "type_name", type(each).__name__), str(each))
            for rank, each in failures.items()
        },
        "cause": str(error.__cause__),
        "partially_loaded": getattr(error, "partially_loaded", None),
    }


class EngineAgent(Agent):
    """Saves and loads; engines have names, so that a process can have several."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._checkpoints: dict[str, CheckpointEngine] = {}
        self._disks: dict[str, FaultyStorage] = {}
        self._trap = Trap()
        self._state: dict[str, Any] = {}
        self._held: dict[str, Gate] = {}

    # Engines.

    async def engine(
        self,
        root: str,
        engine: str = "main",
        group: str = "world",
        coordinator_rank: int = 0,
        mode: Any = "auto",
        coordination: float = 20.0,
        exit_grace: float = 5.0,
        pending_saves: int = 1,
        overlap: bool = False,
        unsafe: bool = False,
        weights: str | None = None,
        keeps: int = 0,
    ) -> Outcome:
        """Open one whose storage can be told to stumble."""
        disk = FaultyStorage(LocalStorage(root))
        made = CheckpointEngine(
            disk,
            staging=StagingOptions(overlap=overlap, part_bytes=1 << 20),
            coordination=Coordination(
                process_group=None if group == "world" else self._groups[group],
                coordinator_rank=coordinator_rank,
                mode=mode,
            ),
            limits=Limits(pending_saves=pending_saves),
            timeouts=Timeouts(coordination=coordination, exit_grace=exit_grace, storage=20.0),
            trust=Trust(unsafe=unsafe),
            format=SafetensorsFormat(weights) if weights else DistcpFormat(),
            retention=KeepLatest(keeps) if keeps else None,
        )
        try:
            await made.open()
        except CheckpointError as error:
            await disk._inner.close()
            return described(error)
        self._checkpoints[engine], self._disks[engine] = made, disk
        return {"kind": "open"}

    async def end(self, engine: str = "main") -> Outcome:
        """Close it; ``seconds`` it took."""
        started = time.monotonic()
        made, disk = self._checkpoints.pop(engine), self._disks.pop(engine)
        try:
            await made.close()
            outcome: Outcome = {"kind": "closed"}
        except CheckpointError as error:
            outcome = described(error)
        await disk._inner.close()
        return outcome | {"seconds": time.monotonic() - started}

    async def abort(self, engine: str = "main") -> None:
        await self._checkpoints.pop(engine).abort()
        await self._disks.pop(engine)._inner.close()

    # The state.

    async def fill(self, value: int, rank: int | None = None, foreign: bool = False) -> None:
        """Hold the state of step ``value``."""
        mine = self._rank if rank is None else rank
        self._state = {
            "model": replicated(value),
            "count": value,
            "own": PerRank(own(mine, value)),
            "trap": self._trap,
        }
        if foreign:
            self._state["foreign"] = Foreign()

    async def edit(self, what: str, value: Any) -> None:
        """Set an entry of the state; a text that names a dtype converts the entry."""
        if isinstance(value, str) and value.startswith("torch."):
            self._state["model"][what] = self._state["model"][what].to(getattr(torch, value[6:]))
        elif what.startswith("model."):
            self._state["model"][what[6:]] = torch.full((100,), float(value))
        else:
            self._state[what] = value

    async def holds(self, value: int, ignore: str = "") -> str | None:
        """Where the state differs from that of step ``value``."""
        wanted = {"model": replicated(value), "count": value, "own": own(self._rank, value)}
        mine = {name: self._state[name] for name in wanted} | {"own": self._state["own"].value}
        return difference(
            {name: mine[name] for name in mine if name != ignore},
            {name: wanted[name] for name in wanted if name != ignore},
        )

    # Saves and loads.

    async def save(
        self,
        step: int | None = None,
        name: str | None = None,
        engine: str = "main",
        mutate: bool = False,
        replace: bool = False,
    ) -> Outcome:
        """Until it is durable. ``mutate``: change a tensor as soon as save() returns."""
        try:
            made = self._checkpoints[engine]
            response = await made.save(self._state, step=step, checkpoint_id=name, replace=replace)
            if mutate:
                self._state["own"].value["noise"].add_(1)
                self._gate("mutated").set()
            info = await response.upload_completion
        except (CheckpointError, ValueError) as error:
            return described(error)
        return {"kind": "committed", "id": info.checkpoint_id, "num_files": info.num_files}

    async def prepare(self, engine: str = "main") -> Outcome:
        """Prepare for saves of the state. ``has_plan``: whether a save would find one."""
        made = self._checkpoints[engine]
        try:
            await made.prepare(self._state)
        except CheckpointError as error:
            return described(error)
        saves: Any = made._saves
        return {"kind": "prepared", "has_plan": saves._runner.carryover.latest is not None}

    async def watch_staging(self) -> None:
        """From here on ``until_copied`` can be awaited."""
        stager: Any = self._checkpoints["main"]._life.setup.stager
        loop, copied = asyncio.get_running_loop(), self._gate("copied")
        copied.clear()
        self._gate("mutated").clear()

        def tell(*_: object) -> None:  # on the engine's loop
            loop.call_soon_threadsafe(copied.set)

        _after(stager, "enqueue", tell)

    async def until_copied(self) -> None:
        """Until a part has been staged."""
        await self._gate("copied").wait()

    async def until_mutated(self) -> None:
        await self._gate("mutated").wait()

    async def cancel_save(self, engine: str = "main") -> None:
        self._checkpoints[engine].pending[-1].cancel()

    async def wait_staged(self, engine: str = "main") -> None:
        await self._checkpoints[engine].pending[-1].staging_completion

    async def load(self, engine: str = "main", **arguments: Any) -> Outcome:
        try:
            report = await self._checkpoints[engine].load(self._state, **arguments)
        except CheckpointError as error:
            return described(error)
        return {
            "kind": "loaded",
            "id": report.checkpoint_id,
            "skipped": report.skipped,
            "why": dict(report.skip_reasons),
        }

    async def remove(self, source: Any, replaced_by: int | None = None) -> Outcome:
        """Remove a checkpoint; if it is ``replaced_by`` a step, once the save of that is durable."""
        engine = self._checkpoints["main"]
        try:
            after = None if replaced_by is None else await engine.save(self._state, step=replaced_by)
            await engine.remove(source, after=after)
        except (CheckpointError, ValueError) as error:
            return described(error)
        return {"kind": "removed"}

    async def removals(self) -> int:
        """How many removals this rank has asked its storage for."""
        return self._disks["main"].calls.count("remove")

    async def latest(self, engine: str = "main") -> Outcome:
        warnings = Logged(logging.WARNING)
        logging.getLogger("dcp_async").addHandler(warnings)
        try:
            info = await self._checkpoints[engine].latest()
        except LoadError as error:
            return described(error)
        finally:
            logging.getLogger("dcp_async").removeHandler(warnings)
        return {"kind": "found", "id": info and info.checkpoint_id, "logged": warnings.texts}

    async def train(self, seconds: float, every: int) -> Outcome:
        """all_reduce in a loop with two saves in flight, on one process group; until rank 0's time is up."""
        engine = self._checkpoints["main"]
        responses = []
        deadline = time.monotonic() + seconds
        rounds = wrong = 0
        going = True
        while going:
            # one element votes on whether to go on, so that all ranks leave the loop in one round
            vote = float(self._rank == 0 and time.monotonic() >= deadline)
            work = torch.full((1000,), float(self._rank + rounds))
            work[0] = vote
            dist.all_reduce(work)
            right = sum(range(self._size)) + rounds * self._size
            wrong += not bool((work[1:] == right).all())
            going = work[0].item() == 0
            if rounds % every == 0:
                await self.fill(rounds)
                responses.append(await engine.save(self._state, step=rounds))
            rounds += 1
        infos = [await response.upload_completion for response in responses]
        return {"wrong": wrong, "rounds": rounds, "ids": [info.checkpoint_id for info in infos]}

    async def messages(self, engine: str = "main") -> tuple[int, int]:
        """(sent, received) by this rank since the engine was opened."""
        coordinator: Any = self._checkpoints[engine]._life.resources.coordinator
        return coordinator.sent, coordinator.received

    async def until_store_gone(self) -> None:
        """Until this rank knows that the group's store is gone."""
        coordinator: Any = self._checkpoints["main"]._life.resources.coordinator
        released = coordinator._connection.released
        loop, known = asyncio.get_running_loop(), asyncio.Event()

        def watch() -> None:  # on the engine's loop
            released.add_done_callback(lambda _: loop.call_soon_threadsafe(known.set))

        released.get_loop().call_soon_threadsafe(watch)
        await known.wait()

    async def until_missed(self) -> None:
        """Until this rank has been told of a verb that the others gave up waiting for it to call."""
        book: Any = self._checkpoints["main"]._life.book
        while not book._missed:
            await asyncio.to_thread(int)  # a round trip, in which the engine's thread gets its turn

    async def collectives(self) -> int:
        """How many the default group has run, by its own count."""
        group: Any = dist.group.WORLD
        return int(group._get_sequence_number_for_group())

    async def one_collective(self) -> None:
        await asyncio.to_thread(dist.all_reduce, torch.ones(1))

    async def forbid_collectives(self) -> None:
        """From here on each raises, by whatever name it is called."""

        def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
            raise AssertionError("a collective was called")

        for name in COLLECTIVES:
            for module in (dist, c10d):
                setattr(module, name, refuse)

    # What shall go wrong.

    async def fail_verb(
        self, at: str, failure: str = "disk", nth: int = 1, times: float = 1, engine: str = "main"
    ) -> None:
        """Fail the nth call of a verb of the storage."""
        self._disks[engine].fail(at, FAILURES[failure](), nth=nth, times=times)

    async def fail_in(self, point: str, failure: str) -> None:
        """Fail once in "capture" or in "stage"."""

        def act() -> NoReturn:
            self._disarm(point)
            made = FAILURES[failure]()
            raise made

        self._arm(point, act)

    async def cancel_in_restore(self) -> None:
        """Let the state ask for the cancellation of the load that fills it, once."""

        def act() -> None:
            self._disarm("restore")
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

        self._arm("restore", act)

    async def kill_in(self, point: str) -> None:
        """Die at a point of the next save, or at a verb of the storage."""
        self._arm(point, die)

    async def hold_verb(self, at: str, nth: int = 1, engine: str = "main") -> None:
        """Keep the nth call of a verb of the storage waiting, and later ones, until ``release_verb``."""
        gate = self._held[at] = Gate()

        async def act(_verb: str, _args: tuple[Any, ...]) -> None:
            await gate.walk_through()

        self._disks[engine]._add(_Fault(at, nth, float("inf"), act))

    async def until_held(self, at: str) -> None:
        await self._held[at].until_arrived()

    async def release_verb(self, at: str) -> None:
        self._held.pop(at).release()

    async def heal(self, engine: str = "main") -> None:
        self._disks[engine].heal()

    def _arm(self, point: str, act: Callable[[], None]) -> None:
        life: Any = self._checkpoints["main"]._life
        if point == "capture":
            self._trap.act = act
        elif point == "restore":
            self._trap.act_on_load = act
        elif point == "stage":
            _before(life.setup.stager, "enqueue", lambda *_: act())
        elif point in ("verdict", "plan", "place", "commit", "ready", "done"):
            _before(
                life.resources.coordinator,
                "exchange",
                lambda _uid, phase, *_: act() if phase == point else None,
            )
        elif point.startswith("after ") and point != "after link":
            after = point.removeprefix("after ")
            _after(
                life.resources.coordinator,
                "exchange",
                lambda _uid, phase, *_: act() if phase == after else None,
            )
        elif point in ("before link", "after link"):
            link = os.link

            def linked(*args: Any, **kwargs: Any) -> None:
                if point == "before link":
                    act()
                link(*args, **kwargs)
                act()

            os.link = linked
        else:

            async def at_verb(_verb: str, _args: tuple[Any, ...]) -> None:
                act()

            self._disks["main"]._add(_Fault(point, 1, float("inf"), at_verb))

    def _disarm(self, point: str) -> None:
        if point == "capture":
            self._trap.act = lambda: None
        elif point == "restore":
            self._trap.act_on_load = lambda: None
        elif point.startswith("after "):
            del self._checkpoints["main"]._life.resources.coordinator.exchange
        else:
            del self._checkpoints["main"]._life.setup.stager.enqueue

    # Hosts.

    async def own_disk(self, at: str) -> None:
        """Mount a file system of this process's own at ``at``, as each node has one, and be called as one."""
        libc = ctypes.CDLL(None, use_errno=True)
        private = 1 << 18 | 1 << 14  # MS_PRIVATE | MS_REC
        for done in (
            libc.unshare(0x04020000),  # CLONE_NEWUTS | CLONE_NEWNS; threads come later, so they inherit them
            libc.mount(b"none", b"/", None, private, None),
            libc.mount(b"tmpfs", at.encode(), b"tmpfs", 0, b"size=16m"),
        ):
            if done:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        socket.sethostname(f"node-{self._rank}")

    async def hasten_visibility(self, seconds: float) -> None:
        """How long a rank waits for a network file system to show it the coordinator's lease."""
        lease._VISIBLE_SECONDS = seconds

    async def listed(self, root: str) -> list[str]:
        """What this process sees below ``root``."""
        return sorted(str(path.relative_to(root)) for path in Path(root).rglob("*"))


def _before(owner: object, name: str, act: Callable[..., None]) -> None:
    real: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def call(*args: Any, **kwargs: Any) -> Any:
        act(*args)
        return await real(*args, **kwargs)

    setattr(owner, name, call)


def _after(owner: object, name: str, act: Callable[..., None]) -> None:
    real: Callable[..., Awaitable[Any]] = getattr(owner, name)

    async def call(*args: Any, **kwargs: Any) -> Any:
        value = await real(*args, **kwargs)
        act(*args)
        return value

    setattr(owner, name, call)
