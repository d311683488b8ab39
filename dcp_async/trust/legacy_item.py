"""Items in the format that ``torch.save`` had until torch 1.6, read here: torch's own readers of it give out
memory that no byte of the file fills, and one of them unpacks archives to disk.

Enters: bytes of unknown origin, and an unpickler that calls nothing but what is allowed. Leaves: an object or
a tensor. Invariant: a storage has exactly the bytes that the item holds for it, before anything is made of
it. Source: torch/serialization.py, ``_legacy_save``: a magic number, a version, facts on the writer's
machine, the object, the keys of its storages, and per key how many elements there are and then these.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .pickle_grammar import run
from .pickle_walk import Outline, Walk

_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:]
_HEADERS = 3
COUNT_BYTES = 8


def is_legacy(head: bytes | bytearray) -> bool:
    """Whether an item that begins so is in the legacy format."""
    # behind PROTO and its number, which was the writer's choice
    return head[2:].startswith(_MAGIC)


def outlines(raw: bytes) -> list[Outline]:
    """What the pickles up to the one of the storages' keys name, the object's the last but one. Raises
    ValueError."""
    pickles: list[Outline] = []
    for _ in range(_HEADERS + 2):
        # seeded_keys: those around the object are read by C's unpickler, which counts no keys
        pickles.append(run(Walk(raw, pickles[-1].end if pickles else 0, seeded_keys=False)))
    return pickles


@dataclass(frozen=True, slots=True)
class LegacyOutline:
    """Where everything lies in an item, as far as its pickles tell."""

    pickled: slice
    """The object's pickle."""
    storages: list[StorageId]
    """In the order in which they lie there, each behind the number of its elements in 8 bytes."""
    data: int
    """Where the first one's number lies."""


def legacy_outline(raw: bytes) -> LegacyOutline:
    """What an item's first bytes tell, which hold all of its pickles. Raises: ValueError if it is damaged, or
    they do not."""
    try:
        return _outline(raw)
    except (ValueError, MemoryError, NameError):
        raise
    except Exception as error:  # pickle raises nearly anything on damaged input
        raise ValueError(f"not a readable pickle: {error}") from error


def _outline(raw: bytes) -> LegacyOutline:
    if not is_legacy(raw):
        raise ValueError("it is neither a zip nor in torch's legacy format")
    *headers, outline, keys_outline = outlines(raw)
    if not _Plain(raw[headers[1].end : headers[2].end]).load().get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    if _Plain(raw[headers[0].end : headers[1].end]).load() != torch.serialization.PROTOCOL_VERSION:
        raise ValueError("it is of an unknown version of torch's legacy format")
    keys = _Plain(raw[outline.end : keys_outline.end]).load()
    pickled = slice(headers[2].end, outline.end)
    # a pass of its own: how long each storage is must be known before any object is made of one
    wanted = _Storages(raw[pickled]).found
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(wanted):
        raise ValueError("it does not hold the storages that it refers to")
    return LegacyOutline(pickled, [wanted[key] for key in keys], keys_outline.end)


def load_legacy(raw: bytes, unpickler: Callable[[Any], Any]) -> Any:
    """The object of an item. Raises: ValueError if it is damaged; what ``unpickler`` raises."""
    outline = legacy_outline(raw)
    storages = _filled(raw, outline)
    reader = unpickler(io.BytesIO(raw[outline.pickled]))
    reader.persistent_load = lambda pid: storages[StorageId.of(pid).key]
    return reader.load()


class _Plain(pickle.Unpickler):
    """Reads the numbers and texts around the object."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="latin-1")

    def find_class(self, module: str, name: str, /) -> Any:
        # torch writes numbers, texts, dicts and lists of them around the object, and nothing else
        raise ValueError("it names a class where none belongs")


@dataclass(frozen=True, slots=True)
class StorageId:
    """What an object's pickle says of a storage."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of(cls, pid: object) -> StorageId:
        if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, numel, view = pid
        # of dtypes that are younger than typed storages, counted in bytes
        is_untyped = kind is torch.UntypedStorage
        if not (is_untyped or isinstance(kind, torch.serialization.StorageType)) or type(key) is not str:
            raise ValueError("it refers to a storage of no type")
        if type(numel) is not int or numel < 0 or view is not None:
            raise ValueError("it refers to a part of a storage")
        return cls(key, torch.uint8 if is_untyped else kind.dtype, numel)


class _Anything:
    """Takes the place of what an object's pickle makes, while its storages are looked for."""

    def __new__(cls, *args: object, **options: object) -> _Anything:
        return object.__new__(cls)

    def _ignore(self, *args: object, **options: object) -> _Anything:
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Storages(pickle._Unpickler):
    """Finds the storages that a pickle refers to, and makes nothing else of it."""

    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled), encoding="latin-1")
        self.found: dict[str, StorageId] = {}
        self.load()

    def find_class(self, module: str, name: str, /) -> Any:
        # no name is imported in this pass, whatever it is
        return torch.UntypedStorage if name == "UntypedStorage" else storage_type(name) or _Anything

    def persistent_load(self, pid: Any, /) -> Any:
        storage = StorageId.of(pid)
        if self.found.setdefault(storage.key, storage) != storage:
            raise ValueError("it refers to one storage in two ways")
        return _Anything()


def storage_type(name: str) -> Any:
    """torch's stand-in for a typed storage's class; None if ``name`` is not one of those."""
    if "Storage" not in name or name == "UntypedStorage":
        return None
    made: Any = torch.serialization.StorageType  # untyped
    try:
        return made(name)
    except KeyError:
        return None


def _filled(raw: bytes, outline: LegacyOutline) -> dict[str, Any]:
    made: dict[str, Any] = {}
    position = outline.data
    for storage in outline.storages:
        start = position + COUNT_BYTES
        position = start + storage.nbytes
        check_count(raw[start - COUNT_BYTES : start], storage)
        if position > len(raw):
            raise ValueError("it is shorter than its storages")
        made[storage.key] = _typed(raw[start:position], storage.dtype)
    return made


def check_count(count: bytes, storage: StorageId) -> None:
    """Whether what stands before a storage's bytes is what the object's pickle says of it. Raises
    ValueError."""
    # the count is in the item twice
    if int.from_bytes(count, "little", signed=True) != storage.numel:
        raise ValueError("it is shorter than its storages")


def _typed(content: Sequence[int], dtype: torch.dtype) -> Any:
    memory = (
        # a copy that may be written to, as every tensor of a load
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    storage: Any = memory.untyped_storage()
    if sys.byteorder == "big":
        storage.byteswap(dtype)
    typed: Any = torch.storage.TypedStorage
    return typed(wrap_storage=storage, dtype=dtype, _internal=True)
