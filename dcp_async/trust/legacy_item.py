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
_COUNT_BYTES = 8


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


def load_legacy(raw: bytes, unpickler: Callable[[Any], Any]) -> Any:
    """The object of an item. Raises: ValueError if it is damaged; what ``unpickler`` raises."""
    if not is_legacy(raw):
        raise ValueError("it is neither a zip nor in torch's legacy format")
    *headers, outline, keys_outline = outlines(raw)
    if not _Plain(raw[headers[1].end : headers[2].end]).load().get("little_endian", True):
        raise ValueError("it was written on a big-endian machine")
    if _Plain(raw[headers[0].end : headers[1].end]).load() != torch.serialization.PROTOCOL_VERSION:
        raise ValueError("it is of an unknown version of torch's legacy format")
    keys = _Plain(raw[outline.end : keys_outline.end]).load()
    pickled = raw[headers[2].end : outline.end]
    # a pass of its own: how long each storage is must be known before any object is made of one
    wanted = _Storages(pickled)
    storages = _filled(raw, keys_outline.end, keys, wanted.found)

    reader = unpickler(io.BytesIO(pickled))
    reader.persistent_load = lambda pid: storages[_StorageId.of(pid).key]
    return reader.load()


class _Plain(pickle.Unpickler):
    """Reads the numbers and texts around the object."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="latin-1")

    def find_class(self, module: str, name: str, /) -> Any:
        # torch writes numbers, texts, dicts and lists of them around the object, and nothing else
        raise ValueError("it names a class where none belongs")


@dataclass(frozen=True, slots=True)
class _StorageId:
    """What an object's pickle says of a storage."""

    key: str
    dtype: torch.dtype
    numel: int

    @classmethod
    def of(cls, pid: object) -> _StorageId:
        if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage":
            raise ValueError("it refers to something that is no storage")
        _, kind, key, _, numel, view = pid
        if not isinstance(kind, torch.serialization.StorageType) or type(key) is not str:
            raise ValueError("it refers to a storage of no type")
        if type(numel) is not int or numel < 0 or view is not None:
            raise ValueError("it refers to a part of a storage")
        return cls(key, kind.dtype, numel)


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
        self.found: dict[str, _StorageId] = {}
        self.load()

    def find_class(self, module: str, name: str, /) -> Any:
        # no name is imported in this pass, whatever it is
        return storage_type(name) or _Anything

    def persistent_load(self, pid: Any, /) -> Any:
        storage = _StorageId.of(pid)
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


def _filled(raw: bytes, position: int, keys: object, wanted: dict[str, _StorageId]) -> dict[str, Any]:
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(wanted):
        raise ValueError("it does not hold the storages that it refers to")
    made: dict[str, Any] = {}
    for key in keys:
        facts = wanted[key]
        numel = int.from_bytes(raw[position : position + _COUNT_BYTES], "little", signed=True)
        position += _COUNT_BYTES
        nbytes = numel * facts.dtype.itemsize
        # the count is in the item twice: what the object says must be what lies here
        if numel != facts.numel or position + nbytes > len(raw):
            raise ValueError("it is shorter than its storages")
        made[key] = _typed(raw[position : position + nbytes], facts.dtype)
        position += nbytes
    return made


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
