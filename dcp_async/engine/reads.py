"""The verbs that give fresh objects: a checkpoint or parts of it, a tensor or a part of one, many in turn.

Enters: what callers pass to ``read``, ``tensor`` and ``stream``. Leaves: objects, or an error of the tree.
They run in the caller's thread but for the reading itself. Each rank reads by itself. Invariant: what a
stream holds in memory is bounded by what it was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import torch

from .._concurrency import Job, SignalSafeFuture, Verb, Wait
from ..catalog import Contents, reference
from ..formats import plain_dtype
from ..info import CheckpointRef, VerifyReport
from ..load import (
    DeviceWrites,
    Index,
    LoadServices,
    batches,
    check_index,
    read_box,
    read_fresh,
    read_names,
    tensor_names,
)
from .fallback import first_whole
from .load_context import LoadContext, device_errors, load_errors

T = TypeVar("T")

_Read = Callable[[Contents, LoadServices, torch.device, DeviceWrites | None], Awaitable[T]]

_BATCHES = 4
"""A stream's budget is so many batches: one that is used, one that is read ahead, and what reading takes."""
_PARTS = 16
"""And so many parts: five of them may be in memory beside their tensors while a batch is read."""
_MIN_PART_BYTES = 1 << 20


def listed(keys: str | Sequence[str] | None) -> Sequence[str] | None:
    """``keys``, of which a text is one: it is a sequence of its characters, and none of them would be a
    key."""
    return [keys] if isinstance(keys, str) else keys


class Reads:
    """The reads of one engine, or of one opened checkpoint. Owns nothing."""

    def __init__(self, context: LoadContext) -> None:
        self._context = context

    def reading(
        self,
        source: CheckpointRef,
        keys: str | Sequence[str] | None,
        device: torch.device | str,
        dequantize: torch.dtype | None = None,
    ) -> Verb[dict[str, Any]]:
        """``CheckpointEngine.read``."""
        context, dtype = self._context, plain_dtype(dequantize)
        context.life.check_open()
        wanted, ref = listed(keys), reference(source)
        yield from context.after_saves_of(ref)
        place = context.device(device)

        async def read(
            contents: Contents, services: LoadServices, device: torch.device, writes: DeviceWrites | None
        ) -> dict[str, Any]:
            plain = contents.dequantized(dtype)
            return await read_fresh(plain, services, keys=wanted, device=device, writes=writes)

        value, _ = yield from first_whole(
            lambda: context.ask(context.catalog.resolve(ref)),
            lambda name, _: self._reading_one(name, read, place),
            falls_back=ref == "latest",
        )
        return value

    def verifying(self, source: CheckpointRef, *, is_name: bool = False) -> Verb[VerifyReport]:
        """``CheckpointEngine.verify``: of "latest" the newest, whatever state it is in.

        ``is_name``: ``source`` is a name, for which the others are not looked at.
        """
        context = self._context
        context.life.check_open()
        ref = reference(source)
        yield from context.after_saves_of(ref)
        have = context.life.resources
        name = str(ref)
        if not is_name:
            name, *_ = yield from context.ask(have.catalog.resolve(ref))
        return (yield from context.ask(have.catalog.verify(name, io_concurrency=have.io_concurrency)))

    def reading_tensor(self, name: str, index: Index, device: torch.device | str) -> Verb[torch.Tensor]:
        """``Checkpoint.tensor``."""
        context = self._context
        context.life.check_open()
        assert context.opened is not None
        contents = context.opened.contents
        # first: what the caller has mistyped is told without a read, and as the caller's error
        check_index(contents, name, index)

        async def read(
            contents: Contents, services: LoadServices, device: torch.device, writes: DeviceWrites | None
        ) -> torch.Tensor:
            if index is ...:  # all of it, as it lay in memory when it was saved
                values = await read_names(contents, services, [name], device=device, writes=writes)
                tensor: torch.Tensor = values[name]
                return tensor
            return await read_box(contents, services, name, index, device=device, writes=writes)

        return (yield from self._reading_one(contents.info.checkpoint_id, read, context.device(device)))

    def reading_file(self, name: str) -> Verb[bytes]:
        """``Checkpoint.file``."""
        context = self._context
        context.life.check_open()
        assert context.opened is not None
        checkpoint_id = context.opened.contents.info.checkpoint_id

        async def read() -> bytes:
            # opened for this one verb: a checkpoint that is closed meanwhile closes its files after it
            contents = await context.catalog.open(checkpoint_id)
            try:
                with load_errors(checkpoint_id):
                    return await contents.attached(name)
            finally:
                await contents.close()

        return (yield from context.ask(read()))

    def _reading_one(self, name: str, read: _Read[T], device: torch.device) -> Verb[T]:
        services = self._context.services()
        writes = self._context.fresh_writes(services, device)
        value = yield from self._context.ask(read_one(self._context, name, read, services, device, writes))
        if writes is not None:
            with device_errors(device):
                writes.hand_out()
        return value

    def streaming(
        self, keys: str | Sequence[str] | None, budget_bytes: int, device: torch.device | str
    ) -> Stream:
        """``Checkpoint.stream``. Raises: ValueError; LoadError for a key that means no tensor."""
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes is at least 1, not {budget_bytes}")
        context = self._context
        context.life.check_open()
        assert context.opened is not None
        names = tensor_names(context.opened.contents, listed(keys))
        return Stream(context, names, budget_bytes, context.device(device))


async def read_one(
    context: LoadContext,
    name: str,
    read: _Read[T],
    services: LoadServices,
    device: torch.device,
    writes: DeviceWrites | None,
) -> T:
    """Open the checkpoint, ``read`` of it, close it. On the engine's loop."""
    contents = await context.catalog.open(name)
    try:
        with load_errors(name):
            return await read(contents, services, device, writes)
    finally:
        await contents.close()


class Stream:
    """Tensors one after another, a batch read ahead as far as the budget allows. For one task or thread."""

    def __init__(
        self, context: LoadContext, names: Sequence[str], budget_bytes: int, device: torch.device
    ) -> None:
        assert context.opened is not None
        contents = context.opened.contents
        self._context = context
        self._name = contents.info.checkpoint_id
        self._device = device
        self._budget_bytes = budget_bytes
        self._batches = batches(contents, names, max(budget_bytes // _BATCHES, 1))
        self._following = next(self._batches, None)
        self._ahead: tuple[Job[dict[str, Any]], DeviceWrites | None, list[str]] | None = None
        self._ahead_bytes = 0
        self._ready: deque[tuple[str, torch.Tensor]] = deque()

    def following(self) -> Verb[tuple[str, torch.Tensor] | None]:
        """The next tensor; None after the last one. After what it raises it is over."""
        if not self._ready:
            self._read_ahead()
            if self._ahead is None:
                return None
            job, writes, names = self._ahead
            used_bytes = self._ahead_bytes
            values = yield from self._context.result_of(job)
            self._ahead = None
            if writes is not None:
                with device_errors(self._device):
                    writes.hand_out()
            # in pairs, so that each tensor belongs to the caller alone once it is given
            self._ready.extend((name, values.pop(name)) for name in names)
            del job, values  # the job keeps what it gave
            # until the caller has used them up these are in memory beside what is read ahead
            if self._following is not None and used_bytes + self._following[1] <= self._budget_bytes:
                self._read_ahead()
        return self._ready.popleft()

    def _read_ahead(self) -> None:
        if self._ahead is not None or self._following is None:
            return
        names, self._ahead_bytes = self._following
        self._following = next(self._batches, None)
        services = self._context.services(max(self._budget_bytes // _PARTS, _MIN_PART_BYTES))
        writes = self._context.fresh_writes(services, self._device)

        async def read(
            contents: Contents, services: LoadServices, device: torch.device, writes: DeviceWrites | None
        ) -> dict[str, Any]:
            return await read_names(contents, services, names, device=device, writes=writes)

        coro = read_one(self._context, self._name, read, services, self._device, writes)
        self._ahead = (self._context.life.submit(coro), writes, names)

    def ending(self) -> Verb[None]:
        """Nothing more is wanted: wait until nothing is read any more."""
        self._ready.clear()
        ahead, self._ahead, self._following = self._ahead, None, None
        if ahead is not None:
            job, _, _ = ahead
            job.cancel()
            # not the job's own future: nobody asks any more how it has ended
            ended: SignalSafeFuture[None] = SignalSafeFuture()
            job.future.add_done_callback(lambda _: ended.set_result(None))
            yield Wait(ended)
