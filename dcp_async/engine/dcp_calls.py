"""DCP's calls, each about one directory: what it needs of an engine is made for it, and released after it.

Enters: a checkpoint's own directory or URL, and what DCP's functions take. Leaves: Metadata, a response, a
filled state. Invariant: of two saves of one directory that this process has begun, the one that was called
later is what stays; whatever a call made is released, by its end or, for a save that goes on, by that save's.
dcp_async.functional awaits these verbs, dcp_async.sync waits for them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from .._concurrency import Inside, SignalSafeFuture, Verb, Wait, drive_blocking
from ..catalog import Opened, is_model_file
from ..coordination import Coordination
from ..errors import CheckpointError, CheckpointNotFoundError, EngineStateError
from ..events import Observer
from ..formats import DISTCP, plain_dtype
from ..options import Limits, Timeouts
from ..planning import PlanningOptions
from ..response import AsyncSaveResponse
from ..staging import StagingOptions
from ..storage import root_and_name
from ..trust import Trust
from .checkpoint import let_go
from .exit_guard import fail_unless_seen
from .lifetime import Lifetime
from .load_context import LoadContext
from .loads import Loads
from .release import check_torch
from .resources import make_setup
from .saves import Saves

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Directory:
    """Where one checkpoint lies."""

    root: str
    """The directory, or URL, that it lies in."""
    name: str

    @classmethod
    def at(cls, checkpoint_id: str | os.PathLike[str]) -> Directory:
        """The directory that ``checkpoint_id`` is the path or URL of. Raises TypeError; ValueError for what
        names none."""
        if not isinstance(checkpoint_id, (str, os.PathLike)):
            raise TypeError(
                f"checkpoint_id={checkpoint_id!r} is the path or URL of a checkpoint's directory (str or "
                f"PathLike), not {type(checkpoint_id).__name__}"
            )
        if isinstance(checkpoint_id, str) and "://" in checkpoint_id:
            try:
                return cls(*root_and_name(checkpoint_id))
            except ValueError as error:  # memory://name has no directory in it
                raise ValueError(
                    f"checkpoint_id={checkpoint_id!r} names a whole root; add the checkpoint's own name: "
                    f"'{checkpoint_id.rstrip('/')}/step-100'"
                ) from error
        # through links, as stock: the very directory that this leads to was meant
        path = os.path.expanduser(os.fsdecode(checkpoint_id))
        if is_model_file(path):  # in Hugging Face's cache a link, to what has another name
            return cls(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        root, name = os.path.split(os.path.realpath(path))
        if not os.fsdecode(checkpoint_id) or not name:
            raise ValueError(f"checkpoint_id={checkpoint_id!r} names no directory that a checkpoint could be")
        return cls(root, name)

    def __str__(self) -> str:
        return f"{self.root}/{self.name}"


@dataclass(frozen=True, slots=True)
class Given:
    """A factory of planners that gives the one that DCP's caller has made."""

    planner: Any

    def __call__(self) -> Any:
        return self.planner


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What calls of one kind have in common; see ``CheckpointEngine`` for each."""

    coordination: Coordination
    save_planner: SavePlanner | None = None
    load_planner: LoadPlanner | None = None
    trust: Trust
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    staging: StagingOptions = field(default_factory=StagingOptions)
    observer: Observer | None = None

    def planning(self) -> PlanningOptions:
        return PlanningOptions(
            save=DefaultSavePlanner if self.save_planner is None else Given(self.save_planner),
            load=DefaultLoadPlanner if self.load_planner is None else Given(self.load_planner),
        )

    def lifetime(self, root: str) -> Lifetime:
        """What a call about ``root`` needs, not open yet. Raises ValueError for a URL that nobody serves."""
        try:
            setup = make_setup(
                root,
                self.staging,
                planning=self.planning(),
                format=DISTCP,
                coordination=self.coordination,
                limits=self.limits,
                timeouts=self.timeouts,
                trust=self.trust,
                observer=self.observer,
                # names are given, so nobody counts steps: what lies beside the directory is not looked at
                is_reader=True,
            )
        except ValueError as error:
            raise ValueError(
                f"checkpoint_id can't be served: {error}; or pass a storage_writer and storage_reader for "
                "it, such as torch's FsspecWriter and FsspecReader"
            ) from error
        return Lifetime(setup)


class DcpCalls:
    """Calls of DCP's functions. Owns the lifetimes that it keeps between calls, by root; those that it does
    not keep end with their calls."""

    def __init__(self, options: CallOptions, *, keeps: bool) -> None:
        """``keeps``: threads and memory serve further calls, until ``closing``."""
        self._options = options
        self._keeps = keeps
        self._kept: dict[str, Lifetime] = {}
        self._opening: dict[str, SignalSafeFuture[None]] = {}
        """Done when the one call that opens a lifetime has."""
        self._is_closed = False
        self.inside = Inside()
        """What a thread is in that runs one of the verbs."""

    def check_open(self) -> None:
        """Raises EngineStateError once it was closed."""
        if self._is_closed:
            raise EngineStateError("this Checkpointer is closed; make a new one")

    def _enter(self, root: str) -> Verb[Lifetime]:
        mine = SignalSafeFuture[None]()
        # one at a time: calls that both come first would open two, of which one would be forgotten
        while self._keeps and (other := self._opening.setdefault(root, mine)) is not mine:
            yield Wait(other)
        try:
            return (yield from self._entered(root))
        finally:
            if self._keeps:
                del self._opening[root]
                mine.set_result(None)

    def _entered(self, root: str) -> Verb[Lifetime]:
        self.check_open()
        check_torch()
        if (life := self._kept.get(root)) is not None:
            return life
        life = self._options.lifetime(root)
        try:
            with life.storage_errors("open"):
                yield from life.opening()
            self.check_open()  # it may have been closed meanwhile
        except BaseException as error:
            yield from life.leaving(type(error))
            raise
        if self._keeps:
            self._kept[root] = life
        return life

    def saving(self, state: Mapping[str, Any], directory: Directory, *, overwrite: bool) -> Verb[Metadata]:
        """DCP's ``save``: returns when the checkpoint is durable. Cancellation: cancels the save."""
        # before anything is waited for: of calls that come meanwhile each waits for the one before it
        with _Turn(directory) as turn:
            life = yield from self._enter(directory.root)
            try:
                response = yield from self._begin(life, state, directory, overwrite, turn)
                try:
                    yield Wait(_upload_of(life, response))
                except BaseException:
                    response.cancel()
                    raise
                response.upload_completion.result(0)  # raises its failure
                metadata: Metadata | None = yield life.submit(
                    life.resources.catalog.metadata(directory.name)
                ).join()
                assert metadata is not None  # it waits without a timeout
                if metadata.storage_meta is not None:  # in the file stands what every copy of it may say
                    metadata.storage_meta.checkpoint_id = str(directory)
            except BaseException as error:
                yield from self._leave(life, error)
                raise
            yield from self._leave(life, None)
            return metadata

    def async_saving(
        self, state: Mapping[str, Any], directory: Directory, *, overwrite: bool
    ) -> Verb[AsyncSaveResponse]:
        """DCP's ``async_save``: returns when the state may change. Cancellation: cancels the save."""
        # before anything is waited for: of calls that come meanwhile each waits for the one before it
        with _Turn(directory) as turn:
            life = yield from self._enter(directory.root)
            try:
                response = yield from self._begin(life, state, directory, overwrite, turn)
            except BaseException as error:
                yield from self._leave(life, error)
                raise
            if not self._keeps:
                _release_after(life, response)
            return response

    def _begin(
        self,
        life: Lifetime,
        state: Mapping[str, Any],
        directory: Directory,
        overwrite: bool,
        turn: _Turn,
    ) -> Verb[AsyncSaveResponse]:
        yield from turn.waiting()
        response = yield from Saves(life).saving(state, None, directory.name, None, overwrite, is_path=True)
        turn.over(after=_upload_of(life, response))
        return response

    def loading(
        self, state: Mapping[str, Any], directory: Directory, dequantize: torch.dtype | None = None
    ) -> Verb[None]:
        """DCP's ``load``: the checkpoint may hold more than ``state`` asks for, dtypes are converted."""
        dtype = plain_dtype(dequantize)
        yield from _after_earlier(directory)
        life = yield from self._enter(directory.root)
        opened: list[Opened] = []
        try:
            yield from _opening(life, directory, opened, dtype)
            yield from Loads(LoadContext(life, opened[0])).loading(
                state,
                opened[0].contents.info,
                keys=None,
                rename=None,
                # a planner of the user's says itself what must be there
                strict=self._options.load_planner is None,
                atomic=False,
                dtypes="convert",
                is_partial=True,
            )
        except BaseException as error:
            yield from self._let_go(life, opened)
            yield from self._leave(life, error)
            raise
        yield from self._let_go(life, opened)
        yield from self._leave(life, None)

    def _let_go(self, life: Lifetime, opened: list[Opened]) -> Verb[None]:
        for one in opened if self._keeps else ():  # else it closes with its lifetime
            yield Wait(life.submit(let_go(life, one)).future, shielded=True)

    def _leave(self, life: Lifetime, error: BaseException | None) -> Verb[None]:
        if not self._keeps:
            yield from life.leaving(None if error is None else type(error))

    def closing(self, exc_type: type[BaseException] | None = None) -> Verb[None]:
        """Wait for the saves in flight, and release what was kept. Raises: the SaveError of a save whose
        failure nobody has looked at."""
        self._is_closed = True
        first: BaseException | None = None
        while self._kept:
            _, life = self._kept.popitem()
            try:
                yield from life.leaving(exc_type)
            except CheckpointError as error:
                first = first or error
        if first is not None:
            raise first


def _opening(
    life: Lifetime, directory: Directory, opened: list[Opened], dtype: torch.dtype | None
) -> Verb[None]:
    loads = Loads(LoadContext(life))
    try:
        yield from loads.opening(directory.name, opened.append, is_name=True, dequantize=dtype)
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"there is no checkpoint in {str(directory)!r}; checkpoint_id is the directory of one "
            "checkpoint, which has a .metadata, not that of a run",
            checkpoint_id=error.checkpoint_id,
        ) from error


def _upload_of(life: Lifetime, response: AsyncSaveResponse) -> SignalSafeFuture[Any]:
    """Done when the upload has ended; holds a failure as a value."""
    writer = life.book.in_flight(response.checkpoint_id)
    if writer is not None:
        return writer.upload.future
    ended: SignalSafeFuture[Any] = SignalSafeFuture()
    ended.set_result(None)
    return ended


_landing: dict[Directory, SignalSafeFuture[Any]] = {}
"""The last save of each directory that this process has begun: with engines that know nothing of each other,
an older state could otherwise land after a newer one, and stay."""
_landing_lock = threading.Lock()
# in a forked child nothing of its parent's will ever land
os.register_at_fork(after_in_child=_landing.clear)


class _Turn:
    """A save's turn among those of its directory, from its call until it has landed or failed."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._landed: SignalSafeFuture[Any] = SignalSafeFuture()
        self._is_over = False
        with _landing_lock:
            self._earlier = _landing.get(directory)
            _landing[directory] = self._landed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # one that failed is over when the one before it is: who waits for this waits for that as well
        self.over(after=self._earlier)

    def waiting(self) -> Verb[None]:
        """Wait for the one before; its failure is told by its own handles."""
        if self._earlier is not None:
            yield Wait(self._earlier)

    def over(self, *, after: SignalSafeFuture[Any] | None) -> None:
        """It has landed when ``after`` is done; only the first call counts."""
        if self._is_over:
            return
        self._is_over = True
        if after is None:
            self._end()
        else:
            after.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        with _landing_lock:
            if _landing.get(self._directory) is self._landed:
                del _landing[self._directory]
        self._landed.set_result(None)


def _after_earlier(directory: Directory) -> Verb[None]:
    """Wait for the save of ``directory`` that any engine of this process has begun."""
    with _landing_lock:
        earlier = _landing.get(directory)
    if earlier is not None:
        yield Wait(earlier)


def _release_after(life: Lifetime, response: AsyncSaveResponse) -> None:
    """Release all of ``life`` once its save has ended."""

    def release() -> None:
        try:
            drive_blocking("close", life.closing(), life.inside)
        except CheckpointError as error:  # it was logged when it happened, and its handles tell it
            logger.debug("closed after %s", error)
            fail_unless_seen(response)

    # no daemon: the end of the process waits for it, and with it for the upload, as for an open engine
    thread = threading.Thread(target=release, name="dcp_async-release")
    try:
        thread.start()
    except RuntimeError as error:  # the process ends, and the engine's own guard sees to the save
        logger.debug("nothing is released before the process ends: %s", error)
