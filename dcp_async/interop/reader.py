"""FileSystemReader: stock plans, our reading fills.

Enters: the calls that torch.distributed.checkpoint makes of a StorageReader. Leaves: filled targets.
Invariant: whatever can be refused is refused before the first target is written to; a load's opened
checkpoint is that of one moment, and belongs to the thread that opened it.
Source: torch/distributed/checkpoint/storage.py, state_dict_loader.py.
"""

from __future__ import annotations

import io
import os
import secrets
import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from .._concurrency import collection_paused
from ..catalog import Catalog, Contents
from ..errors import LoadError
from ..load import DeviceWrites, LoadServices, read_planned
from ..staging import CaptureInProgressError, Stager
from ..state import Region
from ..trust import Trust
from .call_resources import CallResources, local_path

# what goes there needs no slots of pinned memory and no stream: meta tensors hold nothing
_HOST = ("cpu", "meta")
_Regions = Mapping[str, Sequence[Region]]


class _Load:
    """One opened checkpoint. Owns it and its CallResources, and ends them with itself."""

    def __init__(self, directory: Path, trust: Trust) -> None:
        self._name = directory.name
        self._trust = trust
        # no wish for one at a time: CallResources takes as many as an engine does
        self._resources = CallResources(directory, io_concurrency=1, trust=trust)
        # whoever only looks at the metadata makes no further call
        self._dropped = weakref.finalize(self, self._resources.close_elsewhere)
        self._dropped.atexit = False
        try:
            self.contents = self._resources.run(self._open())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the checkpoint. A second call does nothing."""
        if self._dropped.detach() is not None:
            self._resources.close()

    async def _open(self) -> Contents:
        resources = self._resources
        await resources.storage.connect()
        catalog = Catalog(resources.storage, resources.threads, lambda name: catalog.metadata(name))
        contents = await catalog.open(self._name)
        resources.readers.append(contents.reader)
        return contents

    def read(self, tensors: _Regions, items: Sequence[str]) -> dict[str, bytes]:
        """Fill ``tensors``; gives ``items``."""
        stager = Stager()
        services = LoadServices(
            threads=self._resources.threads,
            stager=stager,
            io_concurrency=self._resources.io_concurrency,
            timeout=self._resources.timeouts.storage,
            trust=self._trust,
        )
        devices = {region.tensor.device for regions in tensors.values() for region in regions}
        away = [device for device in devices if device.type not in _HOST]
        writes: DeviceWrites | None = None
        if away:
            self._resources.run(stager.open())
        try:
            if away:
                writes = DeviceWrites(stager, away, services.threads, services.timeout)
            values = self._resources.run(
                read_planned(self.contents, services, tensors=tensors, items=items, writes=writes)
            )
            if writes is not None:
                writes.hand_out()
        except CaptureInProgressError as error:
            raise LoadError(f"nothing can be loaded while a graph is captured: {error}") from error
        finally:
            if away:
                self._resources.run(stager.close())
        return values


class _Current(threading.local):
    """The load that each thread is at."""

    load: _Load | None = None


class FileSystemReader(StorageReader):
    """Reads our checkpoints and stock's as stock plans it: verified, within our trust, at our speed.

    For ``torch.distributed.checkpoint.load`` and what calls it. It takes the place of stock's reader of this
    name. Checksums are verified wherever the writer recorded any, leaves are unpickled by the planner only
    after ``trust`` has admitted them, and a checkpoint whose files are not whole is refused before a target
    is touched; a block that turns out bad afterwards raises ``CorruptCheckpointError`` with
    ``partially_loaded=True``.

    One reader may serve several loads at once, each from a thread of its own.

    Ranks: each opens the checkpoint itself, as with stock's reader.
    """

    def __init__(
        self, path: str | os.PathLike[str], _extension_registry: Any = None, *, trust: Trust = Trust()
    ) -> None:
        """
        Args:
            path: the checkpoint's directory; a load's ``checkpoint_id`` takes its place.
            _extension_registry: only None: torch's stream extensions are read as torch registers them.
            trust: what leaves may name, and which links are followed.
        Raises: TypeError, ValueError.
        """
        if _extension_registry is not None:
            raise ValueError(
                "_extension_registry=...: this reader takes the extensions that torch registers; use torch's "
                "FileSystemReader for others"
            )
        self._path = local_path(path)
        self._trust = trust
        self._load_id = secrets.token_hex(8)
        self._current = _Current()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self._path)!r})"

    @property
    def trust(self) -> Trust:
        """Which pickled leaves are accepted."""
        return self._trust

    @property
    def checkpoint_id(self) -> str:
        """The directory that is read."""
        return os.fspath(self._path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a directory that this process can read: it need not be writable."""
        try:
            path = local_path(checkpoint_id)
        except (TypeError, ValueError):
            return False
        return path.is_dir() and os.access(path, os.R_OK)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._let_go()
        if checkpoint_id:
            self._path = local_path(checkpoint_id)
        self._load_id = secrets.token_hex(8)

    def _let_go(self) -> None:
        load, self._current.load = self._current.load, None
        if load is not None:
            load.close()

    # no **kwargs: stock asks a second time, for a rank's own metadata, where there are any; ours is merged
    def read_metadata(self) -> Metadata:
        """DCP's Metadata. Opens the checkpoint, until it is read or ``reset``.

        Raises: CheckpointNotFoundError, CorruptCheckpointError, UntrustedCheckpointError, StorageError;
        stock's ``load`` makes an AssertionError of it, with its words.
        """
        self._let_go()
        load = self._current.load = _Load(self._path, self._trust)
        metadata = load.contents.metadata
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self._load_id
        return metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do: what was opened is what is read."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` asks for. Raises: LoadError and what derives from it."""
        load = self._current.load
        if load is None:
            raise RuntimeError(
                "read_metadata() was not called from this thread: the calls of one load come from one thread"
            )
        try:
            tensors: defaultdict[str, list[Region]] = defaultdict(list)
            targets: list[tuple[ReadItem, torch.Tensor]] = []
            leaves: list[ReadItem] = []
            with collection_paused():
                for item in plan.items:
                    if item.type is LoadItemType.BYTE_IO:
                        leaves.append(item)
                        continue
                    # with its parameter's autograd, which a target must not have
                    target = planner.resolve_tensor(item).detach()
                    _check_size(item, target)
                    tensors[item.storage_index.fqn].append(Region(target, _offsets(item)))
                    targets.append((item, target))
            values = load.read(tensors, list(dict.fromkeys(item.storage_index.fqn for item in leaves)))
            # once all of it is there: a load that fails has changed no leaf
            for item, target in targets:
                planner.commit_tensor(item, target)
            for item in leaves:
                planner.load_bytes(item, io.BytesIO(values[item.storage_index.fqn]))
        finally:
            self._let_go()
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _offsets(item: ReadItem) -> tuple[int, ...]:
    """Where in the whole tensor the wanted box begins: an item tells where in a stored chunk."""
    stored = item.storage_index.offset or (0,) * len(item.storage_offsets)
    return tuple(chunk + within for chunk, within in zip(stored, item.storage_offsets, strict=True))


def _check_size(item: ReadItem, target: torch.Tensor) -> None:
    if tuple(target.shape) != tuple(item.lengths):
        raise LoadError(
            f"{item.dest_index.fqn}: the planner's tensor has the shape {tuple(target.shape)}, "
            f"its plan reads {tuple(item.lengths)}; nothing was loaded"
        )
