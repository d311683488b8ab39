"""Registering the pool's memory with a device, early and beside everything else.

Enters: arenas that a state with device tensors is staged in. Leaves: arenas whose slots are pinned chunk by
chunk, or a refusal, remembered. Invariant: one thread makes all calls, so that CUDA's last error, its current
device and its capture mode are nobody else's; what it registered it unregisters, in order, before memory is
unmapped, and never under a copy.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import queue
import threading
import weakref
from collections.abc import Callable

import torch

from ..._concurrency import BlockingThreads
from ..device import Backend
from .arena import Arena, Ranges, touch

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 30
"""What one call registers: the first slots are usable before the last ones, and drivers refuse single calls
of 512 GiB."""
_PATIENCE = 60.0
"""Registering a chunk takes a second or two."""


class _Registrations:
    """What the thread has to do, and whether it can end. It refers to neither pinner nor arena."""

    def __init__(self) -> None:
        # its put() may be called by the collector, in the middle of anything
        self.orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.num_arenas = 0
        """How many are registered, be it in part. For the thread, and for who has made sure that it rests."""
        self.is_closing = False
        """Nothing more is to be registered."""
        self._is_ending = False

    def serve(self) -> None:
        """The thread, until there is nothing left to unregister and nobody to register for."""
        while not self._is_ending or self.num_arenas:
            order = self.orders.get()
            try:
                order()
            except Exception:  # the device's: there is memory to unregister still
                logger.exception("the staging pool can't be pinned")
            del order  # while it waits it must keep no memory

    def end(self, done: concurrent.futures.Future[bool]) -> None:
        """There is nobody to register for any more. ``done`` tells when all that was ordered before is
        done."""
        self.orders.put(functools.partial(self._end, done))

    def _end(self, done: concurrent.futures.Future[bool]) -> None:
        self._is_ending = True
        done.set_result(True)


class Pinner:
    """Registers arenas. Owns the thread, and what it registered."""

    def __init__(
        self,
        backend: Backend,
        pinned: bool | None = None,
        *,
        chunk_bytes: int = _CHUNK_BYTES,
        patience: float = _PATIENCE,
    ) -> None:
        """
        Args:
            pinned: as in StagingOptions.
            chunk_bytes: how much one call registers.
            patience: how many seconds ``close`` waits for the call in progress.
        """
        self._patience = patience
        self._backend = backend
        self._chunk_bytes = chunk_bytes
        self._is_forbidden = pinned is False
        # who asked for it has to hear of a refusal; to the others the copies are as good, but slower
        self._level = logging.WARNING if pinned else logging.INFO
        self._registrations = _Registrations()
        self._threads: BlockingThreads | None = None
        self._lock = threading.Lock()
        self._wanted: weakref.WeakKeyDictionary[Arena, concurrent.futures.Future[bool]]
        self._wanted = weakref.WeakKeyDictionary()
        self._is_closed = False
        self._has_told = False

    def __repr__(self) -> str:
        return f"<Pinner of {len(self._wanted)} arenas>"

    def want(self, arena: Arena, device: torch.device) -> concurrent.futures.Future[bool]:
        """Begin to register ``arena`` for copies from and to ``device``, unless that was asked before.

        Never waits. The future tells when it was done whole, or (False) refused or not to be done; an arena
        that was refused is not tried again.
        """
        with self._lock:
            if (known := self._wanted.get(arena)) is not None:
                return known
            done = self._wanted[arena] = _running()
            is_wanted = not self._is_closed and not self._is_forbidden and self._backend.can_pin(device)
            if not is_wanted or not self._has_thread():
                done.set_result(False)
            else:
                pinning = _Pinning(self, arena, device, done, self._registrations)
                self._registrations.orders.put(pinning)
            return done

    def _has_thread(self) -> bool:
        """Start the thread; a process that never asks has none. False where the interpreter is ending."""
        if self._threads is None:
            try:
                self._threads = BlockingThreads("dcp_async-pin", 1)
            except RuntimeError as error:
                logger.info("the staging pool is not pinned: %s", error)
                return False
            self._threads.submit(self._registrations.serve)
        return True

    def abandon(self) -> None:
        """Stop waiting for a call that hangs."""
        if self._threads is not None:
            self._threads.abandon()

    def open(self) -> None:
        """Serve again, after ``close``."""
        with self._lock:
            if self._is_closed:
                # a new one, since the old thread may serve the old one until its last lease ends
                self._registrations, self._is_closed = _Registrations(), False

    def close(self) -> None:
        """Unregister what is idle, and end the thread; it goes on for as long as somebody holds a lease of
        the rest."""
        with self._lock:
            self._is_closed, registrations = True, self._registrations
            registrations.is_closing = True
            threads, self._threads = self._threads, None
        if threads is None:
            return
        done = _running()
        registrations.orders.put(functools.partial(self._unpin_idle, registrations, done))
        # abandoned, the thread hangs in a call, and will not come to it
        if not threads.is_abandoned:
            try:
                done.result(self._patience)
            except TimeoutError:
                logger.warning(
                    "the device does not end a call that pins the staging pool; its memory stays mapped"
                )
                threads.abandon()
        # with arenas left the thread ends with their last lease, which nobody can wait for here
        threads.shutdown(wait=registrations.num_arenas == 0)

    def _unpin_idle(self, registrations: _Registrations, done: concurrent.futures.Future[bool]) -> None:
        """In the thread: it may have been about to register a chunk."""
        for arena in list(self._wanted):
            if arena.idle:
                arena.unpin()
        registrations.end(done)

    def register(self, arena: Arena, device: torch.device, start: int, registrations: _Registrations) -> int:
        """Register the chunk that begins at ``start``, in the thread; gives where it ends, or ``start`` where
        that is refused."""
        if registrations.is_closing:
            return start
        step = max(self._chunk_bytes // arena.slot_bytes, 1) * arena.slot_bytes
        stop = min(start + step, arena.nbytes)
        touch(arena, start, stop)
        if not self._backend.pin(device, arena.tensor.data_ptr() + start, stop - start):
            self._tell(arena.nbytes - start)
            return start
        if not start:
            registrations.num_arenas += 1
        arena.pinned(start, stop, _Unpinning(self._backend, device, registrations))
        return stop

    def _tell(self, nbytes: int) -> None:
        if self._has_told:
            return
        self._has_told = True
        logger.log(
            self._level,
            "the system refuses to pin %d MiB of the staging pool; they are copied through a pinned buffer "
            "instead, which takes longer and a core: raise the limit of locked memory (ulimit -l, or "
            "memlock in a container), or leave more memory free",
            nbytes >> 20,
        )


class _Pinning:
    """Registers an arena chunk by chunk for as long as anybody else refers to it, and to the pinner."""

    def __init__(
        self,
        pinner: Pinner,
        arena: Arena,
        device: torch.device,
        done: concurrent.futures.Future[bool],
        registrations: _Registrations,
    ) -> None:
        self._registrations = registrations
        self._pinner = weakref.ref(pinner)
        self._arena = weakref.ref(arena)
        self._device = device
        self._done = done

    def __call__(self) -> None:
        start, is_whole = 0, False
        try:
            while (stop := self._next(start)) is not None and stop > start:
                start = stop
            is_whole = stop is None
        finally:
            self._done.set_result(is_whole)

    def _next(self, start: int) -> int | None:
        """Where the chunk at ``start`` ends, None behind the last one."""
        # a function of its own: between two chunks no local keeps the arena, which may be let go of
        arena, pinner = self._arena(), self._pinner()
        if arena is None or pinner is None:
            return start
        if start == arena.nbytes:
            return None
        return pinner.register(arena, self._device, start, self._registrations)


class _Unpinning:
    """What an arena calls when it goes."""

    def __init__(self, backend: Backend, device: torch.device, registrations: _Registrations) -> None:
        self._backend = backend
        self._device = device
        self._registrations = registrations

    def __call__(self, address: int, ranges: Ranges, memory: object) -> None:
        # not here: the caller may be the collector, in a thread that captures a graph or sits on another
        # device
        self._registrations.orders.put(functools.partial(self._unpin, address, ranges, memory))

    def _unpin(self, address: int, ranges: Ranges, memory: object) -> None:
        """``memory`` stays mapped until this has returned."""
        for start, _ in ranges:
            self._backend.unpin(self._device, address + start)
        ranges.clear()
        self._registrations.num_arenas -= 1


def _running() -> concurrent.futures.Future[bool]:
    """A future that no waiter can cancel."""
    future: concurrent.futures.Future[bool] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    return future
