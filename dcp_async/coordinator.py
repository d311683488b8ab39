"""How ranks agree. One verb serves plans, verdicts, outcomes and the commit: every rank sends, the
coordinator decides.

Invariant: an exchange is matched by its save's uid and its phase, so saves in flight can't mix, and no
exchange is a collective of the training's process group. Ranks arrive with a later release; one process runs
the same protocol against itself.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, TypeVar

import anyio
import torch.distributed as dist
import xxhash

from .errors import EngineStateError

M = TypeVar("M")
A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordination:
    """How the processes that save together find each other."""

    mode: Literal["auto", "local"] = "auto"
    """"local": this process saves alone, whatever else runs. "auto": refuses where other ranks would
    overwrite its files."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "local"):
            raise ValueError(f"Coordination(mode=...) is 'auto' or 'local', not {self.mode!r}")


class RemoteError(Exception):
    """What went wrong on another rank: a message travels, not an object."""

    def __init__(
        self, *, phase: str, kind: str, message: str, traceback: str = "", cancelled: bool = False
    ) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.phase = phase
        self.kind = kind
        """Name of the exception's type there."""
        self.traceback = traceback
        self.cancelled = cancelled


class RemoteFailure(Exception):
    """Other ranks reported that a save (or load) failed; ``failures`` maps rank to RemoteError."""

    def __init__(self, failures: Mapping[int, RemoteError]) -> None:
        super().__init__("; ".join(f"rank {rank}: {error}" for rank, error in sorted(failures.items())))
        self.failures = dict(failures)


class Coordinator(Protocol):
    """What a save needs of the other ranks."""

    rank: int
    world_size: int
    is_coordinator: bool

    async def open(self) -> None:
        """Meet the other ranks and agree on a nonce."""

    def uid(self, ordinal: int, name: str) -> str:
        """The save's id, 16 hex digits, the same on every rank without a message."""

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        """Send ``message``; the coordinator calls ``decide`` with all ranks' messages; each rank gets its
        answer. Both are plain data.

        Ranks: all must call it, with the same ``uid`` and ``phase``.
        Raises: RemoteFailure; on the coordinator what ``decide`` raised.
        """

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """Tell the other ranks that ``uid`` failed here. A second call changes nothing."""

    async def failed(self, uid: str) -> NoReturn:
        """Wait until another rank has failed ``uid``. Raises RemoteFailure."""

    def forget(self, uid: str) -> None:
        """``uid`` is over on this rank."""

    async def close(self) -> None:
        """Leave; no exchange may follow."""

    def abandon(self) -> None:
        """Stop waiting for anybody: the process must end."""


class LocalCoordinator:
    """The protocol for a process that saves alone."""

    rank = 0
    world_size = 1
    is_coordinator = True

    async def open(self) -> None:
        self._nonce = secrets.token_hex(8)

    def uid(self, ordinal: int, name: str) -> str:
        return xxhash.xxh3_64_hexdigest(f"{self._nonce}/{ordinal}/{name}".encode())

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        (answer,) = await decide([message])
        return answer

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """There is nobody to tell."""

    async def failed(self, uid: str) -> NoReturn:
        while True:
            await anyio.sleep_forever()

    def forget(self, uid: str) -> None:
        """Nothing is remembered."""

    async def close(self) -> None:
        """There is nobody to leave."""

    def abandon(self) -> None:
        """Nobody is waited for."""


def make_coordinator(options: Coordination) -> Coordinator:
    """The coordinator that ``options`` ask for. Raises EngineStateError where other ranks would be written
    over."""
    if options.mode == "auto":
        if dist.is_available() and dist.is_initialized():
            world = dist.get_world_size()
        else:
            world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            raise EngineStateError(
                f"this process is one of {world} ranks, and this release saves from one process: "
                "the ranks would write over each other. "
                "Give each rank its own root and Coordination(mode='local')"
            )
    return LocalCoordinator()
