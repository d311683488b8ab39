"""One rank's connection to the others, over their group's store: how it begins, what it reads, how it ends.

Enters: a store that can be cloned. Leaves: messages to the rank's inbox, in order. Invariant: a rank that has
said goodbye makes no key anew, so the coordinator, which leaves last, deletes all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Set

import anyio
import torch.distributed as dist

from .._concurrency import settle
from ..errors import EngineStateError
from .heartbeat import Heartbeat, heartbeat_key
from .messages import Goodbye, Left, Message, StoreGone, Tick, from_plain
from .rendezvous import Rendezvous
from .sender import Sender
from .store_channel import StoreChannel, StoreGoneError, Woken

logger = logging.getLogger(__name__)


class Connection:
    """Owns two threads and two clones of the store, from ``open()`` to ``close()``; of use on one loop."""

    def __init__(self, process_group: dist.ProcessGroup, *, coordinator_rank: int) -> None:
        self.rank = process_group.rank()
        self.world_size = process_group.size()
        self.coordinator_rank = coordinator_rank
        self.nonce = ""
        """Tells this engine's keys and uids from those of all others on the store."""
        self.coordinator_host = ""
        self.unread: dict[int, int | None] = {}
        """Ranks that said goodbye: what each did not read, None for one that reads on until it is told to
        leave."""
        self.sender: Sender
        self.heartbeat: Heartbeat
        self._channel: StoreChannel
        self._group: dist.ProcessGroup | None = process_group
        # usually hosts the store, unless the launcher does: then it waits for the others without need
        self._is_host = dist.is_initialized() and dist.get_rank() == 0
        self._is_leaving = False

    def __repr__(self) -> str:
        return f"<Connection of rank {self.rank} of {self.world_size}>"

    @property
    def sent(self) -> int:
        """Messages that this rank sent since it met the others."""
        return self._channel.sent

    @property
    def received(self) -> int:
        """Messages that this rank received since it met the others."""
        return self._channel.received

    @property
    def released(self) -> asyncio.Future[None]:
        """Done when nothing will be sent or received any more."""
        return self._released

    async def open(self, *, digest: str, seconds: float) -> None:
        """Meet the other ranks. Raises EngineStateError; then it is closed, and so it is if cancelled."""
        assert self._group is not None, "opened once"
        self._loop = asyncio.get_running_loop()
        self._released: asyncio.Future[None] = self._loop.create_future()
        self._alone: asyncio.Future[None] = self._loop.create_future()
        try:
            store = self._group.get_group_store()
        except RuntimeError as error:
            raise EngineStateError(f"the process group has no store: {error}") from error
        self._channel = StoreChannel(store, "dcp_async")
        self._group = None
        meeting = Rendezvous(
            channel=self._channel,
            rank=self.rank,
            world_size=self.world_size,
            coordinator_rank=self.coordinator_rank,
            digest=digest,
            timeout=seconds,
        )
        try:
            self.nonce, self.coordinator_host = await meeting.meet()
        except BaseException:
            self._channel.close()
            raise
        self.heartbeat = Heartbeat(timeout=seconds, now=self._loop.time())

    def start(self, hear: Callable[[Message], None], watched: Callable[[], list[int]]) -> None:
        """Beat, and call ``hear`` on the loop with all that comes, until this rank leaves. ``watched`` says
        at each beat whose silence concerns anybody."""
        self.sender = Sender(
            channel=self._channel, nonce=self.nonce, rank=self.rank, released=self._released, hear=hear
        )
        is_coordinator = self.rank == self.coordinator_rank
        self._channel.read_from(self.sender.inbox if is_coordinator else self.sender.outbox(self.rank))
        self._channel.sent = self._channel.received = 0  # what it took to meet is no cost of a save
        self._reading = self._channel.wait_with(self._read, hear)
        self._reading.add_done_callback(self.sender.watch)
        self._beating = self._loop.create_task(self._beat_on(hear, watched))

    def _read(self, hear: Callable[[Message], None]) -> None:
        """In the thread that waits."""
        with contextlib.suppress(Woken):
            while True:
                message = from_plain(self._channel.take())
                self._loop.call_soon_threadsafe(hear, message)

    async def _beat_on(self, hear: Callable[[Message], None], watched: Callable[[], list[int]]) -> None:
        """Until cancelled, or the store is gone."""
        while True:
            ranks = watched()
            self.heartbeat.ask(self._loop.time())
            beats = self.sender.beat(ranks)
            # counted in waits that this process lived through, not by the clock: see the module heartbeat
            waited = 0.0
            while not beats.done():
                await asyncio.wait({beats}, timeout=self.heartbeat.interval)
                waited += self.heartbeat.interval
                # watched anew: a save may have begun to wait since the beat was asked for
                if not beats.done() and (silent := self.heartbeat.unanswered(watched(), waited)):
                    hear(silent)
            try:
                by_rank = dict(zip(ranks, beats.result(), strict=True))
            except StoreGoneError as error:
                hear(StoreGone(why=str(error)))
                return
            if silent := self.heartbeat.answered(by_rank, self._loop.time()):
                hear(silent)
            hear(Tick())
            await asyncio.sleep(self.heartbeat.interval)

    def part(self, goodbye: Goodbye) -> None:
        """A rank has left."""
        self.unread[goodbye.rank] = goodbye.unread
        self.give_up_on(frozenset())

    def give_up_on(self, lost: Set[int]) -> None:
        """Nobody waits any more for a goodbye of ``lost``."""
        # not before: a rank that was silent may move again, and say goodbye then
        if self._is_leaving and len(self.unread.keys() | lost) == self.world_size - 1:
            self.stop_waiting()

    def stop_waiting(self) -> None:
        """Leave without waiting for anybody."""
        settle(self._alone)

    def release(self) -> None:
        """Nothing will be sent or received any more: every wait for the store ends."""
        settle(self._released)
        self.stop_waiting()

    def abandon(self) -> None:
        """For a process that must end now: threads that hang are left behind."""
        self._channel.abandon()
        self.release()

    async def close(self, *, grace: float) -> None:
        """Say goodbye, wait up to ``grace`` seconds for those who need this rank, free everything. Never
        raises for a store that is gone. Cancellation: leaves at once."""
        self._is_leaving = True
        try:
            if self.rank == self.coordinator_rank:
                await self._leave_last(grace)
            else:
                await self._leave(grace)
        except StoreGoneError as error:
            logger.debug("left without a goodbye: %s", error)
        finally:
            self._beating.cancel()
            # also when cancelled: what follows joins the threads, and one of them waits for a message
            with anyio.CancelScope(shield=True):
                await self._channel.stop_taking(self._reading)
            self._channel.close()

    async def _leave(self, grace: float) -> None:
        self._beating.cancel()  # or it would make a key anew that the coordinator deletes
        channel, sender = self._channel, self.sender
        if self._is_host:
            # the others need the store that lives in this process, so this rank is not the one to hurry
            sender.send_in(Goodbye(rank=self.rank, unread=None))
            await asyncio.wait({self._alone}, timeout=grace)
        await channel.stop_taking(self._reading)
        # the wake that ended the reading may have been put twice, see StoreChannel
        await sender.call(channel.delete, [f"{sender.outbox(self.rank)}/{channel.unread}"])
        if not self._is_host:
            # the last that this rank does with the store, and known to have arrived: its host may leave now
            sender.send_in(Goodbye(rank=self.rank, unread=channel.unread))
            await sender.call(channel.add, sender.inbox, 0)

    async def _leave_last(self, grace: float) -> None:
        channel, sender = self._channel, self.sender
        # all others may have said goodbye before this rank began to leave
        self.give_up_on(frozenset())
        await asyncio.wait({self._alone}, timeout=grace)
        self._beating.cancel()
        await channel.stop_taking(self._reading)
        if len(self.unread) == self.world_size - 1:
            # only now: a rank that still beats or sends would make these keys anew
            last = await sender.call(channel.add, sender.inbox, 0)
            beats = [heartbeat_key(self.nonce, rank) for rank in range(self.world_size)]
            # one more than were numbered: there lies the wake that ended the reading
            rest = [f"{sender.inbox}/{number}" for number in range(channel.unread, last + 2)]
            await sender.call(channel.delete, [*rest, sender.inbox, *beats])
        for rank in range(self.world_size):
            unread = self.unread.get(rank)
            if rank == self.rank:
                continue
            if unread is not None:
                await sender.call(channel.delete_unread, sender.outbox(rank), unread)
            else:  # one that waits for this, or has not closed
                reason = f"rank {self.rank}, the coordinator, closed its engine"
                sender.send_out(rank, Left(reason=reason))
        await sender.call(int)  # what was sent has been handed over
