"""Real processes that form a gloo group and do what a test tells them, one verb at a time.

In: `World(size)`, then `world[rank].start(verb, ...) -> Call`, `Call.result()`. Processes are forked from a
server that has imported torch already; every wait has a deadline, and leaving the world kills what is left,
by pid.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.distributed import agent
from tests.support.processes import CONTEXT

PATIENCE = 100.0
"""Seconds that any one answer may take: not what an idle machine needs, but when a test is told what hangs,
before pytest ends it."""
NEVER = 10_000.0
"""Seconds of a time limit that must not be what ends a wait: a test that runs into it fails by PATIENCE."""


class Failed(Exception):
    """The verb raised; `kind` is the type's name, `failures` those of a RemoteFailure."""

    def __init__(self, kind: str, text: str, failures: dict[int, agent.Fields]) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text, self.failures = kind, text, failures


class Call:
    """One verb that a process is at, or has done."""

    def __init__(self, member: Member, number: int) -> None:
        self._member, self._number = member, number

    def done(self) -> bool:
        self._member.read()
        return self._number in self._member.answers

    def result(self, patience: float = PATIENCE) -> Any:
        """What the verb returned. Raises Failed."""
        deadline = time.monotonic() + patience
        while not self.done():
            left = deadline - time.monotonic()
            if left <= 0 or not self._member.wait(left):
                raise AssertionError(
                    f"{self._member!r} did not answer in {patience:g} s\n{self._member.stderr()}"
                )
        kind, *rest = self._member.answers[self._number]
        if kind == "raised":
            raise Failed(*rest)
        return rest[0]

    def error(self, patience: float = PATIENCE) -> Failed:
        """What the verb raised."""
        try:
            value = self.result(patience)
        except Failed as error:
            return error
        raise AssertionError(f"nothing was raised, but {value!r} returned")

    def cancel(self) -> None:
        self._member.start("cancel", call=self._number).result()


class Member:
    """One process of a world."""

    def __init__(self, rank: int, size: int, loop: str, errors: Path, kind: type[agent.Agent]) -> None:
        self.rank = rank
        self.answers: dict[int, tuple[Any, ...]] = {}
        self._errors = errors
        self._calls = 0
        self._connection: Connection[Any, Any]
        self._connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=agent.main, args=(theirs, rank, size, loop, str(errors), kind))
        self.process.start()
        theirs.close()

    def __repr__(self) -> str:
        return f"<rank {self.rank}, pid {self.process.pid}, exit code {self.process.exitcode}>"

    def stderr(self) -> str:
        """All but c10d's remark that it found no name for an address, which is up to the resolver."""
        text = self._errors.read_text(errors="replace") if self._errors.exists() else ""
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if "hostname of the client socket cannot be" not in line)

    def start(self, verb: str, **arguments: Any) -> Call:
        self._calls += 1
        self._connection.send((self._calls, verb, arguments))
        return Call(self, self._calls)

    def do(self, verb: str, **arguments: Any) -> Any:
        return self.start(verb, **arguments).result()

    def exchange(self, ordinal: int = 1, phase: str = "verdict", message: Any = None, **more: Any) -> Call:
        return self.start("exchange", ordinal=ordinal, phase=phase, message=message, **more)

    def read(self) -> None:
        while self._connection.poll():
            try:
                number, *answer = self._connection.recv()
            except EOFError:
                break
            self.answers[number] = tuple(answer)

    def wait(self, patience: float) -> bool:
        """Whether something came, or the process ended, in time."""
        ready = multiprocessing.connection.wait([self._connection, self.process.sentinel], patience)
        if ready == [self.process.sentinel]:
            raise AssertionError(f"{self!r} ended\n{self.stderr()}")
        return bool(ready)

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.process.kill()
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None

    def finish(self, patience: float = PATIENCE) -> int:
        """Ask it to end as a script does; the exit status."""
        self.start("finish")
        self.process.join(patience)
        assert self.process.exitcode is not None, f"{self!r} does not end\n{self.stderr()}"
        return self.process.exitcode


class World:
    """`size` processes in one process group, whose store lives in rank 0, or, with ``host="apart"``, in a
    process of its own, as a launcher does it."""

    def __init__(
        self,
        size: int,
        folder: Path,
        *,
        loop: str = "asyncio",
        host: str = "rank 0",
        libuv: bool = True,
        kind: type[agent.Agent] = agent.Agent,
    ) -> None:
        self.members: list[Member] = []
        self.host: Member | None = None
        try:
            for rank in range(size):
                self.members.append(Member(rank, size, loop, folder / f"stderr-{rank}", kind))
            if host == "apart":
                self.host = Member(size, size, loop, folder / "stderr-host", kind)
            self.port: int = (self.host or self.members[0]).do("serve_store", libuv=libuv)
            self.all("join", port=self.port)
        except BaseException:
            self.kill()
            raise

    def __getitem__(self, rank: int) -> Member:
        return self.members[rank]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        for member in [*self.members, *([self.host] if self.host else [])]:
            if member.process.exitcode is None:
                member.signal(signal.SIGCONT)
                member.kill()

    def begin(self, verb: str, ranks: Sequence[int] | None = None, **arguments: Any) -> list[Call]:
        chosen = range(len(self.members)) if ranks is None else ranks
        return [self.members[rank].start(verb, **arguments) for rank in chosen]

    def all(self, verb: str, ranks: Sequence[int] | None = None, **arguments: Any) -> list[Any]:
        """The verb on all ranks at once."""
        return [call.result() for call in self.begin(verb, ranks, **arguments)]

    def open(self, ranks: Sequence[int] | None = None, **arguments: Any) -> None:
        self.all("open", ranks, **arguments)

    def errors(self, calls: Sequence[Call]) -> list[Failed]:
        return [call.error() for call in calls]

    def end(self) -> None:
        """All close and exit with 0, and none has written a word to stderr."""
        self.all("close_all")
        for member in reversed(
            self.members
        ):  # the store's host last would hide a rank that needs it too long
            member.start("finish")
        for member in self.members:
            member.process.join(PATIENCE)
        said = [(repr(member), member.stderr()) for member in self.members]
        assert [member.process.exitcode for member in self.members] == [0] * len(self.members), said
        assert [text for _, text in said] == [""] * len(said), said


def open_engines(world: World, root: Path, **options: Any) -> None:
    """Replica agents open an engine each, on one root."""
    opened = world.all("replica_engine", root=str(root), **options)
    assert [outcome["kind"] for outcome in opened] == ["open"] * len(opened), opened
