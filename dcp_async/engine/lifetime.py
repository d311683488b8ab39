"""An engine's life: what it holds while it is open, and how it ends.

Enters: the engine's parts, made or given. Leaves: jobs on its loop thread, or EngineStateError where it can't
take any. Invariant: what the engine made it closes, what it was given it never closes; it ends by a drain or
by an abort, never by silence. Verbs are generators, see _concurrency/verbs.py. Source: docs/adr/0001.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Coroutine
from typing import Any, Literal, TypeVar

import anyio
from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import (
    BlockingThreads,
    Inside,
    Job,
    LoopThread,
    Verb,
    Wait,
    on_work_thread,
)
from .._foreign import storage_errors
from ..catalog import Opened
from ..coordination import make_coordinator
from ..errors import EngineStateError
from ..response import ResponseWriter
from .admission import SaveBook
from .exit_guard import ExitGuard, main_has_ended
from .optimizer_hooks import OptimizerHooks
from .resources import Resources, Setup, make_calls, make_catalog
from .tiers import Replication

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ABORT_SECONDS = 5.0
"""How long cancelled saves may take to end before the calls that they wait for are abandoned."""


class Lifetime:
    """Opens, drains, releases. Owns its loop thread, its work threads and the hooks; the storage and the
    stager only if its setup says so."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.book = SaveBook(setup.limits.pending_saves)
        self.hooks = OptimizerHooks()
        self.inside = Inside()
        self.state: Literal["new", "open", "closing", "closed"] = "new"
        self.resources: Resources
        """From ``opening`` on."""
        self.opened: set[Opened] = set()
        """Checkpoints that stay open until somebody closes them, or the engine. On the loop."""
        self.replication = Replication(setup.tiered)
        self._pid = os.getpid()
        # a __del__ that the collector runs may come in again, in the thread that holds it
        self._lock = threading.RLock()
        self._jobs: set[Job[Any]] = set()
        """Live jobs but for those that end the engine."""
        self._has_opened = False
        """``opening`` has done its work; ``state`` tells so from its beginning on."""
        self._exiting = False
        """The trainer's threads have ended: from here on a save is durable before ``save`` returns."""
        self._is_unheard = False
        """Nobody will call ``wait`` or ``close`` any more and be told of a failure."""

    def opening(self) -> Verb[None]:
        """Start threads, connect the parts, look at what the root holds; a failure releases everything."""
        self.check_process()
        self._check_thread()
        with self._lock:
            if self.state != "new":
                raise EngineStateError(f"this engine is {self.state}; make a new one to open it again")
            self.resources = self._make_resources()
            self.state = "open"
        # a cancelled caller waits until this has released everything again: it has nothing to close
        try:
            yield self.resources.loop.submit(self._open()).join()
        except BaseException:
            if self.state == "open":  # cancelled before it began, or as it ended
                yield Wait(self.resources.loop.submit(self._undo_opening()).future, shielded=True)
            raise

    def _make_resources(self) -> Resources:
        setup, loop = self.setup, LoopThread("dcp_async-engine")
        coordinator = make_coordinator(
            setup.coordination,
            timeouts=setup.timeouts,
            digest=setup.configuration,
            missed=self.book.missed,
        )
        setup.check_ranks(coordinator.world_size)
        try:
            loop.start()
            threads = BlockingThreads("dcp_async-work", setup.limits.io_concurrency + 1)
        except RuntimeError as error:
            raise EngineStateError(
                f"the engine can't start its threads ({error}); open it before the program ends"
            ) from error
        calls = make_calls(setup)
        return Resources(
            setup=setup,
            coordinator=coordinator,
            loop=loop,
            threads=threads,
            calls=calls,
            catalog=make_catalog(setup, threads, calls, self.metadata_of),
        )

    def _guard(self) -> None:
        """What an end needs. On the loop."""
        self._release_lock = asyncio.Lock()
        self._exiting = main_has_ended()
        self._exit_guard = ExitGuard(
            self._drain_at_exit, self._release_at_exit, self.setup.timeouts.exit_grace + 4 * _ABORT_SECONDS
        )

    async def _undo_opening(self) -> None:
        if not self._has_opened:
            self._guard()
        await self._shut_down(0.0)

    async def _open(self) -> None:
        self._guard()
        try:
            # first: ranks that do not fit together find out before anything is asked of the root
            await self.resources.coordinator.open()
            await self.setup.storage.connect()
            await self.setup.stager.open()
            if not self.setup.is_reader:
                self.book.seen_steps(await self.resources.catalog.steps())
            self.replication.start(self.resources)
        except BaseException:
            await self._release()
            raise
        self._has_opened = True

    async def metadata_of(self, name: str) -> Metadata:
        """Decodes the metadata of a checkpoint for its CheckpointInfo, which may outlive the engine."""
        metadata = await self.submit(self.resources.catalog.metadata(name)).join().wait()
        assert metadata is not None  # it waits without a timeout
        return metadata

    def leaving(self, exc_type: type[BaseException] | None) -> Verb[None]:
        """The end of the ``with`` block: an error drains too and is never masked, an interrupt has
        ``exit_grace``."""
        if exc_type is None:
            yield from self.closing()
        elif not self._is_ended():
            if issubclass(exc_type, Exception):
                yield from self._draining()
            else:
                yield from self._ending(self.setup.timeouts.exit_grace)
            # raised, it would mask what has ended the block
            for error in self.book.take_unobserved():
                logger.error("the block ended by %s; besides, %s", exc_type.__name__, error)

    def waiting(self) -> Verb[None]:
        """Wait until no save is in flight. Raises what nobody has looked at."""
        # cancelled, the drain ends and the saves go on
        yield self.submit(self._drain(None)).join()
        self._raise_unobserved()

    def closing(self) -> Verb[None]:
        """Drain and release; an interrupt shortens the drain. Raises what nobody has looked at."""
        if not self._is_ended():
            yield from self._draining()
            self._raise_unobserved()

    def _draining(self) -> Verb[None]:
        try:
            yield Wait(self._begin_end(None).future)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            if not self._is_ended():  # else in this very moment: nothing is left to interrupt
                yield from self._ending(self.setup.timeouts.exit_grace)
            self.hooks.remove()
            raise
        # in the caller's thread, which runs no step now: within one torch iterates over its hooks
        self.hooks.remove()

    def aborting(self) -> Verb[None]:
        """Cancel what is in flight and release."""
        if not self._is_ended():
            yield from self._ending(0.0)

    def _ending(self, patience: float | None) -> Verb[None]:
        """Drain for ``patience`` seconds, abort the rest, release; another interrupt aborts at once."""
        try:
            yield Wait(self._begin_end(patience).future, shielded=True)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            if not self._is_ended():
                yield Wait(self._begin_end(0.0).future, shielded=True)
            raise
        self.hooks.remove()

    def _begin_end(self, patience: float | None) -> Job[None]:
        """From here on no job is taken but further ends."""
        # first: an engine whose end could not be submitted has to stay open for another try
        job = self.submit(self._shut_down(patience), closing=True)
        with self._lock:
            if self.state == "open":
                self.state = "closing"
        return job

    def _is_ended(self) -> bool:
        self.check_process()
        return self.state in ("new", "closed")

    def check_process(self) -> None:
        """Raises EngineStateError in a forked child."""
        if os.getpid() != self._pid:
            raise EngineStateError(
                "this process was forked from the one that made the engine, and its threads stayed there; "
                "make a new engine here, or start workers with the 'spawn' method"
            )

    def check_open(self, *, closing: bool = False) -> None:
        """Raises EngineStateError unless jobs are taken. ``closing``: also while it ends."""
        self.check_process()
        if self.state == "new":
            raise EngineStateError(
                "the engine is not open: use `async with CheckpointEngine(...)`, or await open()"
            )
        if self.state == "closed" or (self.state == "closing" and not closing):
            raise EngineStateError(f"the engine is {self.state}; make a new one")
        if not (closing or self._has_opened):
            # a save would be numbered without the steps that lie under the root
            raise EngineStateError("the engine is being opened: wait until open() has returned")
        self._check_thread()

    def on_own_thread(self) -> bool:
        """Whether waiting here might wait for this very thread."""
        return (self.state != "new" and self.resources.loop.is_current()) or on_work_thread()

    def _check_thread(self) -> None:
        if self.on_own_thread():
            raise EngineStateError(
                "an engine can't be called from its own threads (a callback, an observer, a __del__ that the "
                "collector runs there): it would deadlock"
            )
        if sys.is_finalizing():
            raise EngineStateError("the interpreter has ended the engine's threads; save before that")

    def submit(self, coro: Coroutine[Any, Any, T], *, closing: bool = False) -> Job[T]:
        """Run ``coro`` on the loop. Raises EngineStateError."""
        try:
            with self._lock:
                self.check_open(closing=closing)
                job = self.resources.loop.submit(coro)
                if not closing:
                    self._jobs.add(job)
            # outside of the lock: one that has ended already calls back at once
            job.future.add_done_callback(lambda _: self._jobs.discard(job))
            return job
        except BaseException as error:
            coro.close()  # else asyncio complains that it was never awaited
            if isinstance(error, RuntimeError) and not isinstance(error, EngineStateError):
                raise EngineStateError("the engine is closed; make a new one") from error
            raise

    def storage_errors(self, verb: str) -> contextlib.AbstractContextManager[None]:
        """What a storage of the user's raises becomes an error of the tree."""
        # this is around all of a verb, and memory may have run out anywhere in it
        return storage_errors(verb, repr(self.setup.storage), passing=(MemoryError,))

    async def _drain(self, patience: float | None) -> bool:
        """Wait for the saves in flight; False if ``patience`` seconds were not enough."""
        waiting = [asyncio.wrap_future(writer.upload.future) for writer in self.book.pending()]
        if not waiting:
            return True
        _, late = await asyncio.wait(waiting, timeout=patience)
        return not late

    async def _shut_down(self, patience: float | None) -> None:
        """Drain, abort what took longer than ``patience`` seconds, release."""
        # the end of the process and a dropped engine come here without _begin_end
        with self._lock:
            if self.state == "open":
                self.state = "closing"
        await self._drain_or_abort(patience)
        await self._end_jobs(patience)
        await self.replication.drain(patience)
        # several ends may be under way: a close that was interrupted, and the abort after it
        async with self._release_lock:
            if self.state != "closed":
                with anyio.CancelScope(shield=True):
                    await self._release()

    async def _drain_or_abort(self, patience: float | None) -> bool:
        """Drain, abort what took longer than ``patience`` seconds; whether nothing did."""
        late = not await self._drain(patience)
        if late:
            self._exit_guard.lost = self._exit_guard.lost or self._exiting
            for response in [writer.response for writer in self.book.pending()]:
                if patience:  # abort() has none, and loses them on purpose
                    logger.critical(
                        "%r could not be saved within %g s and is aborted", response.checkpoint_id, patience
                    )
                response.cancel()
            # a cancelled save joins its calls, so this takes as long as the slowest of them
            if not await self._drain(_ABORT_SECONDS):
                logger.critical("the storage does not answer; its calls are abandoned")
                self.resources.abandon()
                await self._drain(_ABORT_SECONDS)
        return not late

    # -- the end of the process

    def _drain_at_exit(self, limit: float) -> bool:
        """What ExitGuard calls when the trainer's threads have ended; False if it took ``limit`` seconds."""
        self._exiting = self._is_unheard = True
        return self.resources.loop.submit(self._exit(release=False)).future.wait(limit)

    def _release_at_exit(self, limit: float) -> bool:
        """What ExitGuard calls among the `atexit` callbacks. Alone, the engine goes on serving: callbacks
        that were registered before it come later."""
        self._exiting = self._is_unheard = True
        release = self.resources.coordinator.world_size > 1
        return self.resources.loop.submit(self._exit(release=release)).future.wait(limit)

    async def _exit(self, *, release: bool) -> None:
        drained = await self._drain_or_abort(self.setup.timeouts.exit_grace)
        if self.book.has_unobserved():
            self._exit_guard.lost = True
        # an engine that could not save what was in flight does not serve `atexit` callbacks either
        if release or not drained or self.state != "open":
            await self._shut_down(self.setup.timeouts.exit_grace)

    def finishing(self, writer: ResponseWriter) -> Verb[None]:
        """``save`` is about to return. While the process ends nobody may look at its handles any more: then
        it is durable, or fails, here."""
        if not (self._exiting or main_has_ended()):
            return
        response, upload = writer.response, writer.upload
        yield Wait(upload.future, timeout=self.setup.timeouts.exit_grace)
        if not upload.future.done():
            response.cancel()
            yield Wait(upload.future, timeout=_ABORT_SECONDS)
        if not upload.future.done():
            raise EngineStateError(
                f"saving {response.checkpoint_id!r} was given up: the process ends, and the storage does not "
                "answer"
            )
        upload.handle.result(0)  # raises its failure

    def lose(self, what: str, why: object) -> None:
        """``what`` can't be saved. While the process ends its status tells so; before, or of an engine that
        its owner has closed, it is the caller's to tell."""
        if self._exiting or (main_has_ended() and self.state in ("open", "closing")):
            logger.critical("what was to be saved as %s while the process ends is lost: %s", what, why)
            self._exit_guard.lose("a save that was asked for while the process ends was lost")

    def dropped(self, what: str) -> None:
        """Nobody refers to the engine any more: warn, let the saves in flight end, release everything. From
        any thread, the loop's as well, and in the middle of anything: the hooks stay, since a step may be
        running, and wait for nothing once the saves are staged."""
        if self.state != "open" or os.getpid() != self._pid or sys.is_finalizing():
            return
        self.state, self._is_unheard = "closing", True
        self.resources.loop.submit(self._shut_down(None))
        warnings.warn(
            f"{what} was dropped while it was open; use `async with`, or await close()",
            ResourceWarning,
            stacklevel=3,
        )

    async def _end_jobs(self, patience: float | None) -> None:
        """Wait for the loads in flight as long as for the saves, then cancel them."""
        waiting = [asyncio.wrap_future(job.future) for job in self._jobs]
        if waiting:
            _, late = await asyncio.wait(waiting, timeout=patience)
            for job in list(self._jobs) if late else ():
                job.cancel()
            if late:
                _, late = await asyncio.wait(late, timeout=_ABORT_SECONDS)
            if late:
                logger.critical("the storage does not answer; its calls are abandoned")
                self.resources.abandon()
                await asyncio.wait(late, timeout=_ABORT_SECONDS)
            for waiter in waiting:
                if waiter.done() and not waiter.cancelled():
                    waiter.exception()  # its own caller is told

    async def _release(self) -> None:
        with self._lock:
            self.state = "closed"
        self.setup.stager.pool.forget(self.resources)
        await self.replication.stop()
        for opened in list(self.opened):  # a last reader may be closing its own
            await opened.close()
        # before its threads end: other ranks wait for this one's goodbye
        await self.resources.coordinator.close()
        if self.setup.owns_stager:
            await self.setup.stager.close()
        await self.resources.release_storage()
        self.resources.threads.shutdown()
        if self._is_unheard and self.book.has_unobserved():
            self._exit_guard.lost = True
        # last but for the loop: until here the interpreter has to wait for this engine
        self._exit_guard.dismiss()
        self.resources.loop.stop()

    def _raise_unobserved(self) -> None:
        failures = self.book.take_unobserved()
        for error in failures[1:]:
            logger.error("another save failed as well: %s", error)
        if failures:
            raise failures[0].fresh()
