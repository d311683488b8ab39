"""What runs in each process of a test's world: verbs over a real StoreCoordinator, on either kind of loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import uvloop

from dcp_async.coordination.failures import RemoteFailure
from dcp_async.coordination.messages import Message
from dcp_async.coordination.store_channel import StoreChannel
from dcp_async.coordination.store_coordinator import StoreCoordinator
from dcp_async.options import Timeouts

STANDSTILL = 1000.0
"""Seconds; longer than any timeout of these tests."""

Fields = tuple[str, str, str, str, bool]
"""Of a RemoteError: phase, type name, message, traceback text, cancelled."""


class LocalError(Exception):
    """One that no other process could unpickle."""

    def __init__(self, text: str, lock: object) -> None:
        super().__init__(text)
        self.lock = lock

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("not to be pickled")


class ShiftedLoop(asyncio.SelectorEventLoop):
    """A loop whose clock tests move on, so that a deadline passes when all is in place for it, and not when a
    busy machine has not come that far."""

    shift = 0.0

    def time(self) -> float:
        return super().time() + self.shift


class ObservedCoordinator(StoreCoordinator):
    """Counts what it hears, so that tests can wait for it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.heard: Counter[str] = Counter()
        self.news = asyncio.Event()

    def _hear(self, message: Message) -> None:
        super()._hear(message)
        self.heard[type(message).__name__] += 1
        self.news.set()

    async def until_heard(self, kind: str, count: int) -> None:
        while self.heard[kind] < count:
            self.news.clear()
            await self.news.wait()

    async def until_caught_up(self) -> None:
        """Until what lies in this rank's box, up to a gap in it, has been taken out."""
        channel, sender = self._connection._channel, self._connection.sender
        waiting = True
        while waiting:  # each look takes a round trip, in which the other thread reads on
            waiting = await sender.call(channel._post_store.check, [f"{channel._box}/{channel.unread}"])
        await sender.call(int)  # by then what was taken last has been heard


class Agent:
    """Runs verbs concurrently; each answers on the connection when it has ended."""

    def __init__(self, connection: Connection[Any, Any], rank: int, size: int) -> None:
        self._connection = connection
        self._rank, self._size = rank, size
        self._finished = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._engines: dict[str, ObservedCoordinator] = {}
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._store: dist.Store | None = None

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._connection.fileno(), self._hear)
        await self._finished.wait()
        loop.remove_reader(self._connection.fileno())

    def _hear(self) -> None:
        while self._connection.poll():
            try:
                number, verb, arguments = self._connection.recv()
            except EOFError:
                self._finished.set()
                return
            method: Callable[..., Awaitable[Any]] = getattr(self, verb)
            self._tasks[number] = asyncio.get_running_loop().create_task(
                self._run(number, method(**arguments))
            )

    async def _run(self, number: int, work: Awaitable[Any]) -> None:
        try:
            value = await work
        except BaseException as error:
            failures = (
                {rank: told.plain() for rank, told in error.failures.items()}
                if isinstance(error, RemoteFailure)
                else {}
            )
            self._connection.send((number, "raised", type(error).__name__, str(error), failures))
        else:
            self._connection.send((number, "returned", value))

    # Groups.

    async def serve_store(self, libuv: bool) -> int:
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=libuv)
        self._store = store
        return store.port

    async def join(self, port: int) -> None:
        """Make the default group on the store at ``port``."""

        def init() -> None:
            if self._store is None:
                self._store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
            dist.init_process_group("gloo", store=self._store, rank=self._rank, world_size=self._size)

        await asyncio.to_thread(init)

    async def leave(self) -> None:
        dist.destroy_process_group()

    async def forget_addresses(self) -> None:
        """Remove gloo's keys, or a group that is made again may connect to the ports of the old one."""
        assert self._store is not None
        for key in self._store.list_keys():
            if "dcp_async" not in key:
                self._store.delete_key(key)

    async def join_file(self, path: str) -> None:
        """Make the default group on a FileStore."""
        await asyncio.to_thread(
            dist.init_process_group,
            "gloo",
            init_method=f"file://{path}",
            rank=self._rank,
            world_size=self._size,
        )

    async def join_uncloneable(self) -> None:
        class Store(dist.Store):
            """Any store of the user's, written in Python."""

            values: dict[str, bytes]

            def set(self, key: str, value: str | bytes) -> None:
                self.values[key] = value.encode() if isinstance(value, str) else value

            def get(self, key: str) -> bytes:
                return self.values[key]

            def add(self, key: str, value: int) -> int:
                self.values[key] = str(int(self.values.get(key, b"0")) + value).encode()
                return int(self.values[key])

            def wait(self, keys: list[str], timeout: timedelta = timedelta(0)) -> None:
                assert all(key in self.values for key in keys)

        store = Store()
        store.values = {}
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    async def subgroup(self, name: str, members: list[int]) -> None:
        group = await asyncio.to_thread(dist.new_group, members)
        if self._rank in members:
            self._groups[name] = group

    async def num_keys(self) -> int:
        assert self._store is not None
        return self._store.num_keys()

    async def threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("dcp_async")]

    async def keys(self) -> list[str]:
        assert self._store is not None
        return sorted(self._store.list_keys())

    # Engines.

    async def open(
        self,
        engine: str = "main",
        group: str = "world",
        coordinator_rank: int = 0,
        coordination: float = 20.0,
        exit_grace: float = 10.0,
        digest: str = "same",
    ) -> None:
        timeouts = Timeouts(coordination=coordination, exit_grace=exit_grace)
        chosen = dist.group.WORLD if group == "world" else self._groups[group]
        assert chosen is not None
        made = ObservedCoordinator(
            chosen, coordinator_rank=coordinator_rank, timeouts=timeouts, digest=digest
        )
        await made.open()
        self._engines[engine] = made

    async def until_heard(self, kind: str, count: int) -> None:
        """Until the engine has heard ``count`` messages of one type since it was opened."""
        await self._engines["main"].until_heard(kind, count)

    async def advance(self, seconds: float = 0.0) -> None:
        """This rank's clock moves on, by an interval of its heartbeats unless told otherwise."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ShiftedLoop), "uvloop's clock can't be moved"
        loop.shift += seconds or self._engines["main"]._connection.heartbeat.interval

    async def live(self) -> None:
        """An interval passes, and this rank has beaten again in it."""
        made = self._engines["main"]
        ticks = made.heard["Tick"]
        await self.advance()
        await made.until_heard("Tick", ticks + 1)
        # or its clock would run ahead of messages that are there, on a machine that is slow to hand them over
        await made.until_caught_up()

    def _uid(self, engine: str, ordinal: int, name: str) -> str:
        return self._engines[engine].uid(ordinal, name)

    async def uid(self, engine: str = "main", ordinal: int = 1, name: str = "") -> str:
        return self._uid(engine, ordinal, name or f"step-{ordinal}")

    async def exchange(
        self,
        ordinal: int = 1,
        phase: str = "verdict",
        message: Any = None,
        decide: str = "tell",
        name: str = "",
        engine: str = "main",
    ) -> Any:
        uid = self._uid(engine, ordinal, name or f"step-{ordinal}")
        return await self._engines[engine].exchange(uid, phase, message, getattr(self, f"_{decide}"))

    async def exchange_big(self, nbytes: int, ordinal: int = 1) -> Any:
        """Each rank sends its own bytes and gets the next rank's; whether they were right."""

        async def rotate(messages: Sequence[bytes]) -> list[bytes]:
            return [*messages[1:], messages[0]]

        generator = [torch.Generator().manual_seed(rank) for rank in range(self._size)]
        blobs = [
            torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=of).numpy().tobytes()
            for of in generator
        ]
        answer = await self._engines["main"].exchange(
            self._uid("main", ordinal, "big"), "plan", blobs[self._rank], rotate
        )
        return answer == blobs[(self._rank + 1) % self._size]

    async def exchange_many(self, ordinals: list[int], phases: list[str]) -> int:
        """All at once, in an order of this rank's own; how many answers were right."""
        order = [(ordinal, phase) for ordinal in ordinals for phase in phases]
        turn = len(order) * self._rank // self._size
        order = order[turn:] + order[:turn]
        answers = await asyncio.gather(
            *(self.exchange(ordinal, phase, [ordinal, phase, self._rank]) for ordinal, phase in order)
        )
        return sum(
            answer == [self._rank, [[*key, rank] for rank in range(self._size)]]
            for key, answer in zip(order, answers, strict=True)
        )

    async def save_often(self, first: int, count: int) -> None:
        """A verdict and a commit each, then over."""
        for ordinal in range(first, first + count):
            for phase in ("verdict", "commit"):
                await self.exchange(ordinal, phase, {"rank": self._rank})
            await self.forget(ordinal)

    async def stale_hello(self) -> None:
        """What processes leave behind that are killed in ``open``, the second while it says hello."""
        group = dist.group.WORLD
        assert group is not None

        def post() -> None:
            box = StoreChannel(group.get_group_store(), "dcp_async")
            box.connect()
            box.post_with(
                box.send_shared, "lobby/in", ("hello", self._rank, "dead", ("other", 0), "")
            ).result()
            box.post_with(box.add, "lobby/in", 1).result()
            box.close()

        await asyncio.to_thread(post)

    async def _tell(self, messages: Sequence[Any]) -> list[Any]:
        return [[rank, list(messages)] for rank in range(len(messages))]

    async def _common(self, messages: Sequence[Any]) -> list[Any]:
        return [True] * len(messages)

    async def _too_few(self, messages: Sequence[Any]) -> list[Any]:
        return [0]

    async def _odd(self, messages: Sequence[Any]) -> list[Any]:
        return [{1, 2}] * len(messages)

    async def _fall(self, messages: Sequence[Any]) -> list[Any]:
        raise LocalError("no space left", asyncio.Lock())

    async def _pause(self, messages: Sequence[Any]) -> list[Any]:
        self._gate("deciding").set()
        await self._gate("decide").wait()
        return await self._tell(messages)

    async def _stand_still(self, messages: Sequence[Any]) -> list[Any]:
        os.kill(os.getpid(), signal.SIGSTOP)
        await self.advance(STANDSTILL)
        self._engines["main"].check_steady("commit")
        return await self._tell(messages)

    def _gate(self, name: str) -> asyncio.Event:
        return self._gates.setdefault(name, asyncio.Event())

    async def open_gate(self, name: str = "decide") -> None:
        self._gate(name).set()

    async def until_deciding(self) -> None:
        await self._gate("deciding").wait()

    async def fail(
        self, ordinal: int = 1, phase: str = "write", text: str = "disk full", cancel: bool = False
    ) -> None:
        error = asyncio.CancelledError() if cancel else LocalError(text, asyncio.Lock())
        try:
            raise error
        except BaseException as raised:
            self._engines["main"].fail(self._uid("main", ordinal, f"step-{ordinal}"), phase, raised)

    async def failed(self, ordinal: int = 1, engine: str = "main") -> None:
        await self._engines[engine].failed(self._uid(engine, ordinal, f"step-{ordinal}"))

    async def cancel_settling(self, ordinal: int = 1) -> None:
        """Of a save that failed here; cancelled while this rank waits to hear how it ended for all."""
        made = self._engines["main"]
        settling = asyncio.create_task(made.settle(self._uid("main", ordinal, f"step-{ordinal}")))
        await asyncio.sleep(0)
        settling.cancel()
        await asyncio.wait({settling})
        assert settling.cancelled()

    async def forget(self, ordinal: int = 1) -> None:
        self._engines["main"].forget(self._uid("main", ordinal, f"step-{ordinal}"))

    async def counts(self) -> tuple[int, int]:
        return self._engines["main"].sent, self._engines["main"].received

    async def held(self) -> int:
        """How much this rank's coordinator remembers: entries in all its tables."""
        return self._engines["main"].num_remembered

    async def die_while_posting(self) -> None:
        """Take a number of the coordinator's box, as a message does, and be killed before it is filled."""
        connection = self._engines["main"]._connection
        await connection.sender.call(connection._channel.add, connection.sender.inbox, 1)
        os.kill(os.getpid(), 9)

    async def close(self, engine: str = "main") -> float:
        """How many seconds it took."""
        started = asyncio.get_running_loop().time()
        await self._engines[engine].close()
        del self._engines[engine]
        return asyncio.get_running_loop().time() - started

    async def abandon(self) -> None:
        self._engines["main"].abandon()

    async def close_all(self) -> None:
        for engine in list(self._engines):
            await self.close(engine)

    async def cancel(self, call: int) -> None:
        self._tasks[call].cancel()

    async def finish(self) -> None:
        self._finished.set()


def main(
    connection: Connection[Any, Any], rank: int, size: int, loop: str, errors: str, kind: type[Agent]
) -> None:
    """The process; its stderr goes to the file ``errors``."""
    descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # a store's client looks its address up; where nobody answers that takes 5 s, more than some deadlines
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    factory = uvloop.new_event_loop if loop == "uvloop" else ShiftedLoop

    async def run() -> None:
        await kind(connection, rank, size).serve()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
    if dist.is_initialized():
        dist.destroy_process_group()
