"""How the ranks of one engine meet: the blocking part of ``StoreCoordinator.open``.

Enters: each rank's hello. Leaves: the engine's nonce and the coordinator's host, the same on all ranks, or
EngineStateError on all.
Invariant: what a former or dead engine left in the store is never taken for this one's, since every hello has
a token of its own, and counts only after its rank has acknowledged what was answered to that token.

Rank 0 of the group is the host. It reads the lobby, a shared box, answers each hello with "welcome", which
the rank acknowledges (and from then on waits for the host's verdict, which names who is missing), and when
all have done so, compares digests and says "go". Engines on one process group are paired by order: each
rank opens them one after another, in the same order. A rank that gave up or was restarted says hello again,
and its newest hello counts, so nothing gets out of step for good, and a group that was destroyed and made
again on the same store just works. What breaks it: two engines of one process that open at the same time on
one group. Ranks may pair them differently; the digests differ then, and all of them are refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio

from ..errors import EngineStateError
from .failures import name_ranks
from .heartbeat import heartbeat_key
from .store_channel import StoreChannel, Woken

_LOBBY, _READ = "lobby/in", "lobby/read"


@dataclass(slots=True, kw_only=True)
class Rendezvous:
    """One rank's part."""

    channel: StoreChannel
    rank: int
    world_size: int
    coordinator_rank: int
    digest: str
    timeout: float
    deadline: float = 0.0
    """time.monotonic(); moves while it runs."""

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.timeout

    async def meet(self) -> tuple[str, str]:
        """Returns the nonce and the name of the coordinator's machine. Raises EngineStateError. Cancellation:
        the rank withdraws."""
        call = self.channel.wait_with(self._run)
        try:
            await self._watch(call)
        finally:
            if not call.done():
                # a thread that still took messages would take those of the next engine
                with anyio.CancelScope(shield=True):
                    await self.channel.stop_taking(call)
        if not call.done():
            raise EngineStateError(f"the process group's store did not answer within {self.timeout:g} s")
        return call.result()

    async def _watch(self, call: concurrent.futures.Future[tuple[str, str]]) -> None:
        """Until ``call`` is done or its deadline is over."""
        waiter = asyncio.wrap_future(call)
        # looked at by whoever made the call, or a rank that was cancelled would leave an unseen error
        waiter.add_done_callback(lambda done: done.cancelled() or done.exception())
        unread = 0
        while not call.done() and (left := self.deadline - time.monotonic()) > 0:
            await asyncio.wait({waiter}, timeout=min(left, self.timeout / 5, 5.0))
            if self.rank == 0 and self.channel.unread == unread and not call.done():
                # a rank that died while it said hello must not keep the hellos behind its own unread
                self.channel.post_with(self.channel.skip_gap).add_done_callback(lambda done: done.exception())
            unread = self.channel.unread

    def _run(self) -> tuple[str, str]:
        """In the thread that waits."""
        self.channel.connect()
        return _Host(self).run() if self.rank == 0 else self._visit()

    def post(self, fn: Callable[..., Any], *args: object) -> Any:
        """In the other thread, in order with all that is posted."""
        return self.channel.post_with(fn, *args).result()

    def _visit(self) -> tuple[str, str]:
        # a new one for each attempt, so that an answer to a former one goes to a box that nobody reads
        token = secrets.token_hex(8)
        self.channel.read_from(f"lobby/{token}")
        seen = False
        self._tell("hello", token, (self.digest, self.coordinator_rank), socket.gethostname())
        try:
            while True:
                kind, value = self.channel.take()
                if kind == "refused":
                    raise EngineStateError(value)
                if kind == "go":
                    nonce, host = value
                    return nonce, host
                seen = True
                nonce, left = value
                # a little longer than the host, which can say who is missing
                self.deadline = time.monotonic() + left + self.timeout / 4 + 1
                # before the rank says that it is there: whoever reads heartbeats reads keys that exist
                self.post(self.channel.add, heartbeat_key(nonce, self.rank), 1)
                self._tell("ack", token, nonce, None)
        except Woken:
            if not seen:  # nobody reads the lobby; this tells whoever does later
                self._tell("withdrawn", token, None, None)
            what = "does not answer any more" if seen else "did not open its engine on this process group"
            raise EngineStateError(
                f"rank 0 {what} within {self.timeout:g} s (this is rank {self.rank}). Every rank has to open "
                "the engine, in the same order if there are several"
            ) from None

    def _tell(self, kind: str, token: str, value: object, more: object) -> None:
        self.post(self.channel.send_shared, _LOBBY, (kind, self.rank, token, value, more))


class _Host:
    """Rank 0's part."""

    def __init__(self, meeting: Rendezvous) -> None:
        self._meeting = meeting
        self._channel = meeting.channel
        self._nonce = secrets.token_hex(8)
        self._digests = {0: (meeting.digest, meeting.coordinator_rank)}
        self._hosts = {0: socket.gethostname()}
        self._tokens: dict[int, str] = {}
        self._present: set[int] = set()
        """Who acknowledged the answer to its newest hello."""

    def run(self) -> tuple[str, str]:
        meeting, post = self._meeting, self._meeting.post
        others = set(range(1, meeting.world_size))
        post(self._channel.add, heartbeat_key(self._nonce, 0), 1)
        self._channel.read_from(_LOBBY, post(self._channel.add, _READ, 0) + 1)
        try:
            while self._present != others:
                message = self._channel.take()
                # counted in the store, where the next engine's host goes on, which may be another process
                post(self._channel.add, _READ, 1)
                self._hear(*message)
        except Woken:
            raise self._refuse(
                f"{name_ranks(sorted(others - self._present))} did not open the engine on this process group "
                f"within {meeting.timeout:g} s"
            ) from None
        self._compare()
        agreed = self._nonce, self._hosts[meeting.coordinator_rank]
        for rank in others:
            self._answer(rank, "go", agreed)
        return agreed

    def _hear(self, kind: str, rank: int, token: str, value: Any, more: Any) -> None:
        if kind == "hello":
            self._tokens[rank] = token
            self._digests[rank], self._hosts[rank] = tuple(value), more
            # said again after a restart or a cancellation: the old one's word no longer counts
            self._present.discard(rank)
            left = max(0.0, self._meeting.deadline - time.monotonic())
            self._answer(rank, "welcome", (self._nonce, left))
        elif self._tokens.get(rank) == token:  # words of a former attempt may arrive after the newest hello
            if kind == "ack" and value == self._nonce:
                self._present.add(rank)
            elif kind == "withdrawn":
                self._present.discard(rank)

    def _compare(self) -> None:
        """All ranks must have the same configuration. Raises EngineStateError, and tells the others."""
        groups: dict[tuple[str, int], list[int]] = {}
        for rank, digest in sorted(self._digests.items()):
            groups.setdefault(digest, []).append(rank)
        if len(groups) > 1:
            told = "; ".join(
                f"{name_ranks(ranks)}: {digest}, coordinator rank {coordinator}"
                for (digest, coordinator), ranks in groups.items()
            )
            usual = max(groups.values(), key=len)
            differing = sorted(set(self._digests) - set(usual))
            raise self._refuse(
                f"{name_ranks(differing)} configured the engine in another way than {name_ranks(usual)} did "
                f"({told}). All ranks need the same root and options, and have to open their "
                "engines in the same order"
            )

    def _answer(self, rank: int, kind: str, value: object) -> None:
        self._meeting.post(self._channel.send, f"lobby/{self._tokens[rank]}", (kind, value))

    def _refuse(self, text: str) -> EngineStateError:
        for rank in self._present:
            self._answer(rank, "refused", text)
        beats = [heartbeat_key(self._nonce, rank) for rank in range(self._meeting.world_size)]
        self._meeting.post(self._channel.delete, beats)
        return EngineStateError(text)
