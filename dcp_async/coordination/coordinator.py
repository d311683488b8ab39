"""How ranks agree. One verb serves plans, verdicts, outcomes and the commit: every rank sends, the
coordinator decides.

Invariant: an exchange is matched by its save's uid and its phase, so saves in flight can't mix, and no
exchange is a collective of the training's process group. One process runs the same protocol against itself.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, Protocol, TypeVar

import anyio
import torch.distributed as dist
import xxhash

from .._foreign import Activity
from ..errors import EngineStateError
from ..options import Timeouts
from .settlement import Verdict
from .store_coordinator import StoreCoordinator
from .sync_points import SyncCalls

M = TypeVar("M")
A = TypeVar("A")


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordination:
    """How the processes that save together find each other."""

    process_group: dist.ProcessGroup | None = None
    """Whose ranks save together; None for all of the job's. Only its store is used: no collective runs on
    it."""
    coordinator_rank: int = 0
    """The rank, within the group, that decides and publishes."""
    mode: Literal["auto", "local"] = "auto"
    """"local": this process saves alone, whatever else runs. "auto": with the other ranks, where
    ``torch.distributed`` is initialised."""

    replicas: Literal["check", "sample", "trust"] = "check"
    """Whether tensors that several ranks hold are compared before one rank's bytes are published. "check":
    those of up to 64 KiB in every save, larger ones as a whole in the first save of a structure and by turns
    in later ones. "sample": all of them by turns, up to 8 MiB a save. "trust": none. A difference fails the
    save on all ranks and names the tensor."""

    def __post_init__(self) -> None:
        if self.replicas not in ("check", "sample", "trust"):
            raise ValueError(
                f"Coordination(replicas=...) is 'check', 'sample' or 'trust', not {self.replicas!r}"
            )
        if self.mode not in ("auto", "local"):
            raise ValueError(f"Coordination(mode=...) is 'auto' or 'local', not {self.mode!r}")
        if self.mode == "local" and self.process_group is not None:
            raise ValueError("Coordination(mode='local') saves alone, so it takes no process_group")
        if self.coordinator_rank < 0:
            raise ValueError(f"Coordination(coordinator_rank=...) is at least 0, not {self.coordinator_rank}")


class Coordinator(Protocol):
    """What a save needs of the other ranks."""

    rank: int
    world_size: int
    is_coordinator: bool
    coordinator_host: str
    """The name of the machine that the coordinator runs on."""
    activity: Activity
    """What code of the trainer's this rank is in."""
    sync_calls: SyncCalls
    """The sync points that this rank is called to, by its own request or another's."""

    async def open(self) -> None:
        """Meet the other ranks and agree on a nonce."""

    def uid(self, ordinal: int, name: str, variant: str = "") -> str:
        """The save's id, 16 hex digits, the same on every rank without a message; ``variant`` tells one of a
        verb's several ids from the others."""

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        """Send ``message``; the coordinator calls ``decide`` with all ranks' messages; each rank gets its
        answer. Both are plain data.

        Ranks: all must call it, with the same ``uid`` and ``phase``.
        Raises: RemoteFailure; on the coordinator what ``decide`` raised.
        """

    def check_steady(self, phase: str) -> None:
        """To be called right before what can't be undone. Raises RemoteError if this process stood still for
        so long that others may have given up on it."""

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """Tell the other ranks that ``uid`` failed here. A second call changes nothing."""

    async def failed(self, uid: str) -> NoReturn:
        """Wait until another rank has failed ``uid``. Raises RemoteFailure."""

    def has_failed(self, uid: str) -> bool:
        """Whether this rank knows that ``uid`` failed, and has not forgotten it."""

    async def settle(self, uid: str, *, flag: bool = False) -> Verdict:
        """How ``uid``, which failed, ended: per rank what it failed at, the same on every rank; and whether
        any rank gave this ``flag``, by which it says that it had gone past a point that the caller cares
        about. Never raises.

        Ranks: all that have a part in it call it once that has ended, before ``forget``.
        """

    def forget(self, uid: str) -> None:
        """``uid`` is over on this rank."""

    def request_sync_point(self, why: str, stop: bool, seconds: float) -> None:
        """Ask that all ranks agree on a step within ``seconds``: each is called, this one included, unless a
        sync point that serves is under way."""

    async def close(self) -> None:
        """Leave; no exchange may follow."""

    def abandon(self) -> None:
        """Stop waiting for anybody: the process must end."""


class LocalCoordinator:
    """The protocol for a process that saves alone."""

    rank = 0
    world_size = 1
    is_coordinator = True
    coordinator_host = socket.gethostname()

    def __init__(self) -> None:
        self.activity = Activity()
        self.sync_calls = SyncCalls()

    async def open(self) -> None:
        # ordinals begin anew in each process, and uids are in the names of files that stay
        self._nonce = secrets.token_hex(8)

    def uid(self, ordinal: int, name: str, variant: str = "") -> str:
        return xxhash.xxh3_64_hexdigest(f"{self._nonce}/{ordinal}/{name}/{variant}".encode())

    async def exchange(
        self, uid: str, phase: str, message: M, decide: Callable[[Sequence[M]], Awaitable[Sequence[A]]]
    ) -> A:
        # nothing is sent, so nothing has to be plain data here
        (answer,) = await decide([message])
        return answer

    def check_steady(self, phase: str) -> None:
        """Nobody gives up on it."""

    def fail(self, uid: str, phase: str, error: BaseException) -> None:
        """There is nobody to tell."""

    async def failed(self, uid: str) -> NoReturn:
        while True:
            await anyio.sleep_forever()

    def has_failed(self, uid: str) -> bool:
        return False

    async def settle(self, uid: str, *, flag: bool = False) -> Verdict:
        # nobody has said anything: whoever asks keeps the error that it has
        return {}, flag

    def forget(self, uid: str) -> None:
        """Nothing is remembered."""

    def request_sync_point(self, why: str, stop: bool, seconds: float) -> None:
        """Whoever saves alone has nobody to agree with."""

    async def close(self) -> None:
        """There is nobody to leave."""

    def abandon(self) -> None:
        """Nobody is waited for."""


def make_coordinator(
    options: Coordination, *, timeouts: Timeouts, digest: str, missed: Callable[[int, str], object]
) -> Coordinator:
    """The coordinator that ``options`` ask for.

    Args: ``digest`` stands for what ranks have to configure alike; ``missed`` is told the ordinal and name of
    what the others gave up waiting for this rank to call.
    Raises: EngineStateError where other ranks would be written over, and for a rank outside of the group.
    """
    # first: a process that saves alone may be one of many that were launched together
    if options.mode == "local":
        return LocalCoordinator()
    if not (dist.is_available() and dist.is_initialized()):
        # launchers set it for each process, whether or not the trainer initialises torch.distributed
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:
            raise EngineStateError(
                f"this process is one of {world} that were launched together, and torch.distributed is not "
                "initialised: they would write over each other. Call init_process_group() before open(), or "
                "give each process its own root and Coordination(mode='local')"
            )
        return LocalCoordinator()
    group = options.process_group or dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # what new_group() gives to ranks outside of it
        raise EngineStateError(
            "this rank is not in Coordination(process_group=...); only its ranks open the engine"
        )
    # no store, no threads, no heartbeat: nobody can be lost
    if group.size() == 1:
        return LocalCoordinator()
    return StoreCoordinator(
        group,
        coordinator_rank=options.coordinator_rank,
        timeouts=timeouts,
        digest=digest,
        missed=missed,
    )
