"""`.metadata`: DCP's pickle of stock classes, encoded once per plan and reused with another uid in its file
names; and decoded, whoever wrote it, by an allow-list.

Enters: DCP's Metadata and where each item lies, or bytes of unknown origin. Leaves: bytes that stock reads,
or a Metadata. Invariants: nothing but the uid changes from save to save until the layout does; nothing that a
`.metadata` names is imported or called but DCP's own classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ..trust import Inert, UntrustedGlobal

UID_DIGITS = 16
_PLACEHOLDER = "\x01uid-goes-here\x02\x03"
assert len(_PLACEHOLDER) == UID_DIGITS


def data_file_name(rank: int, number: int, uid: str) -> str:
    """The name of a rank's ``number``-th data file."""
    return f"__{rank}_{number}-{uid}.distcp"


@dataclass(frozen=True, slots=True)
class MetadataTemplate:
    """The pickle of a Metadata, cut at each place where the uid goes."""

    pieces: tuple[bytes, ...]

    def render(self, uid: str) -> bytes:
        """The bytes of `.metadata` for one save."""
        assert len(uid) == UID_DIGITS
        return uid.encode().join(self.pieces)


def metadata_template(
    metadata: Metadata, places: Mapping[MetadataIndex, tuple[int, int, int]], *, file_number: int = 0
) -> MetadataTemplate:
    """Encode ``metadata`` with ``places``: index -> (rank, offset, length) of each item.

    One ``str`` object per file, so that pickle stores each name, and with it the uid, once.
    """
    names = {rank: data_file_name(rank, file_number, _PLACEHOLDER) for rank, _, _ in places.values()}
    storage_data = {
        index: _StorageInfo(relative_path=names[rank], offset=offset, length=length)
        for index, (rank, offset, length) in places.items()
    }
    complete = dataclasses.replace(
        metadata, storage_data=storage_data, storage_meta=None, version=CURRENT_DCP_VERSION
    )
    raw = pickle.dumps(complete, protocol=4)
    return MetadataTemplate(tuple(raw.split(_PLACEHOLDER.encode())))


def _path(*parts: str) -> str:
    """Stands in for every pathlib class: 3.13's pickles name a module that older Pythons lack."""
    return "/".join(parts)


@lru_cache(maxsize=1)
def _stock_globals() -> dict[tuple[str, str], Any]:
    """What stock's pickles name, under the names of this torch and of older ones."""
    names: dict[tuple[str, str], Any] = {}
    encoding = dcp_metadata._MEM_FORMAT_ENCODING
    # the second was its home until torch 2.0
    for package in ("torch.distributed.checkpoint", "torch.distributed._shard.checkpoint"):
        for cls in (
            Metadata,
            MetadataIndex,
            dcp_metadata.StorageMeta,
            dcp_metadata.TensorStorageMetadata,
            dcp_metadata.ChunkStorageMetadata,
            dcp_metadata.BytesStorageMetadata,
            dcp_metadata.TensorProperties,
            encoding,
        ):
            names[f"{package}.metadata", cls.__name__] = cls
        names[f"{package}.filesystem", "_StorageInfo"] = _StorageInfo
    sharded = "torch.distributed._shard.sharded_tensor.metadata"  # the home of two of them until torch 2.3
    names[sharded, "TensorProperties"] = dcp_metadata.TensorProperties
    names[sharded, "MEM_FORMAT_ENCODING"] = encoding
    names["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    names["torch", "Size"] = torch.Size
    names["torch", "device"] = torch.device
    names["collections", "OrderedDict"] = OrderedDict
    for value in vars(torch).values():
        if isinstance(value, torch.dtype):
            names["torch", str(value).removeprefix("torch.")] = value
    for module in ("pathlib", "pathlib._local"):
        for path in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"):
            names[module, path] = _path
    return names


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        self.foreign: list[str] = []
        """What it named beyond stock's classes; something inert took its place."""

    def find_class(self, module: str, name: str, /) -> Any:
        found = _stock_globals().get((module, name))
        if found is None:
            self.foreign.append(f"{module}.{name}")
            return Inert
        return found


@contextlib.contextmanager
def _unchanged_globals() -> Iterator[None]:
    """Undo and refuse what a pickle's BUILD does to the classes it was handed; the C unpickler can't be told
    not to.

    `.metadata` of many tensors must decode fast, so the Python unpickler, which can, is no choice here.
    """
    watched = [
        item
        for item in set(_stock_globals().values())
        if isinstance(getattr(item, "__dict__", None), Mapping)
    ]
    before = [dict(vars(item)) for item in watched]
    changed: list[str] = []
    try:
        yield
    finally:
        for item, old in zip(watched, before, strict=True):
            now = dict(vars(item))
            for name in now.keys() | old.keys():
                if name in old and now.get(name) is not old[name]:
                    setattr(item, name, old[name])
                    changed.append(f"{item.__qualname__}.{name}")
                elif name not in old:
                    delattr(item, name)
                    changed.append(f"{item.__qualname__}.{name}")
    if changed:
        raise UntrustedGlobal(f"{changed[0]} (to change it)")


def decode_metadata(raw: bytes) -> Metadata:
    """DCP's Metadata from the bytes of `.metadata`.

    A planner may keep objects of its own beside what a load needs, most likely in ``planner_data``; where it
    did, that attribute is None.

    Raises: UntrustedGlobal for foreign names in what a load needs; ValueError for no pickle of a Metadata.
    """
    unpickler = _MetadataUnpickler(raw)
    try:
        with _unchanged_globals():
            metadata = unpickler.load()
    except UntrustedGlobal:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        if unpickler.foreign:
            raise UntrustedGlobal(unpickler.foreign[0]) from error
        raise ValueError(f"not a readable pickle: {error}") from error
    if unpickler.foreign:
        if not isinstance(metadata, Metadata):
            raise UntrustedGlobal(unpickler.foreign[0])
        for name, value in list(vars(metadata).items()):
            if _holds_inert(value):
                if name in ("state_dict_metadata", "storage_data"):
                    raise UntrustedGlobal(unpickler.foreign[0])
                setattr(metadata, name, None)
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError(f"it holds a {type(metadata).__name__}, not DCP's Metadata")
    return metadata


def _holds_inert(whole: object) -> bool:
    """Whether ``whole`` holds an object that could not be made; it may be nested deeply or in circles."""
    seen: set[int] = set()
    todo = [whole]
    while todo:
        item = todo.pop()
        if isinstance(item, Inert) or item is Inert:
            return True
        if id(item) in seen or isinstance(item, (str, int, float, type, torch.Size, torch.dtype)):
            continue
        seen.add(id(item))
        if isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        else:
            todo += getattr(item, "__dict__", {}).values()
    return False
