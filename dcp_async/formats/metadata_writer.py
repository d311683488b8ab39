"""Encodes `.metadata`, DCP's pickle of stock classes, once per plan; each save puts its uid into the names of
files.

Enters: what DCP's Metadata says of each name, and where each item lies. Leaves: bytes that stock reads.
Invariant: nothing but the uid changes from save to save until the layout does.
"""

from __future__ import annotations

import copyreg
import io
import logging
import pickle
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem as _filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .._names import UID_DIGITS, FileKey, file_of, manifest_file

logger = logging.getLogger(__name__)

_DCP_VERSION = getattr(_filesystem, "CURRENT_DCP_VERSION", "1.0.0")
"""A torch that has no name for it does not ask for it either."""

# Control characters: the pickle is cut wherever this stands, and no name has it by chance.
_PLACEHOLDER = "\x01uid-goes-here\x02\x03"
assert len(_PLACEHOLDER) == UID_DIGITS


@dataclass(frozen=True, slots=True)
class MetadataTemplate:
    """The pickle of a Metadata, cut at each place where the uid goes."""

    pieces: tuple[bytes, ...]

    def render(self, uid: str) -> bytes:
        """The bytes of `.metadata` for one save."""
        assert len(uid) == UID_DIGITS
        return uid.encode().join(self.pieces)


Place = tuple[FileKey, int, int]
"""(file, offset in it, length)."""


@dataclass(frozen=True, slots=True)
class Group:
    """Names of which `.metadata` says the same, but for where they lie."""

    entry: STORAGE_TYPES
    names: Sequence[str]
    places: Iterable[Sequence[Place]]
    """Per name, where each chunk of ``entry`` lies; what is no tensor lies at one place."""


def metadata_template(
    groups: Sequence[Group],
    paths: Mapping[str, Sequence[str | int]],
    *,
    planner_data: object = None,
) -> MetadataTemplate:
    """Encode what ``groups`` hold, with ``paths`` for planner_data, or ``planner_data`` itself.

    Written opcode by opcode: the objects per item that a pickler would be given, five dicts and more, took
    most of the time and the memory for many ranks. What many items have in common comes first; then a name is
    stored once and referred to from then on.
    """
    constants = _Constants()
    entries = [_entry(constants, group.entry) for group in groups]
    items = _Items(constants, [_chunk_heads(constants, group.entry) for group in groups])
    known = ("state_dict_metadata", "planner_data", "storage_data")
    keys = {key: constants(key) for key in known}
    # whatever fields this torch's Metadata has, so that its own readers find them
    # of a state without bytes no data file is named: the manifest tells all the same whose `.metadata` it is
    saved = StorageMeta(save_id=manifest_file(_PLACEHOLDER))
    others = dict(vars(Metadata({})), storage_meta=saved, version=_DCP_VERSION)
    rest = [constants(key) + constants(value) for key, value in others.items() if key not in known]
    own = constants(planner_data) if planner_data is not None else None
    whole = constants(Metadata) + _NEW
    # no new constant from here on: names take the memories behind theirs
    strings = _Strings(constants.num_remembered)
    out = io.BytesIO()
    # the head is asked for last, as each constant above has added to it
    out.writelines((constants.head(), whole, keys["state_dict_metadata"], _DICT))
    for group, entry in zip(groups, entries, strict=True):
        out.writelines(strings[name] + entry for name in group.names)
    out.writelines((pickle.SETITEMS, keys["planner_data"]))
    if own is None:
        out.writelines((_DICT, *(strings[name] + strings.path(path) for name, path in paths.items())))
        out.write(pickle.SETITEMS)
    else:
        out.write(own)
    out.writelines((keys["storage_data"], _DICT))
    out.writelines(items.encoded(strings, groups))
    out.writelines((pickle.SETITEMS, *rest, _BUILT, pickle.STOP))
    return MetadataTemplate(tuple(out.getvalue().split(_PLACEHOLDER.encode())))


_PROTOCOL = 3
"""The newest without frames, which could not be taken apart."""
_DICT = pickle.EMPTY_DICT + pickle.MARK
_NEW = pickle.EMPTY_TUPLE + pickle.NEWOBJ + _DICT
"""After a class: an object of it, whose attributes follow."""
_BUILT = pickle.SETITEMS + pickle.BUILD


_FIELDS = 5
"""How many fields of the state of TensorProperties stock before torch 2.15 reads, and every later one."""
_UNREAD = 6
"""The sixth is the strides: no stock reads them back, and ours are in the manifest (docs/adr/0014)."""


def _properties_state(properties: Any) -> tuple[Any, ...]:
    """The state of a TensorProperties in the form that every stock reads, unless that would lose
    something."""
    state: tuple[Any, ...] = properties.__getstate__()
    if len(state) <= _FIELDS:
        return state
    plain: Any = TensorProperties(dtype=properties.dtype)
    defaults: tuple[Any, ...] = plain.__getstate__()
    if state[_UNREAD:] == defaults[_UNREAD:]:
        return state[:_FIELDS]
    logger.warning(
        "the planner says %r of a tensor, which only torch %s and later can read: stock of an older torch "
        "will not load this checkpoint",
        properties,
        torch.__version__,
    )
    return state


def _reduced(properties: TensorProperties) -> tuple[Any, ...]:
    return copyreg.__newobj__, (TensorProperties,), _properties_state(properties)  # type: ignore[attr-defined]  # as object.__reduce_ex__ gives it


_PICKLED_AS: ChainMap[Any, Any] = ChainMap({TensorProperties: _reduced}, copyreg.dispatch_table)


class _Constants:
    """The opcodes that push a value: a reference to where it stands in full, at the head of the pickle."""

    def __init__(self) -> None:
        self._head = [pickle.PROTO + bytes([_PROTOCOL])]
        self._file = io.BytesIO()
        self._pickler = pickle.Pickler(self._file, _PROTOCOL)
        self._pickler.dispatch_table = _PICKLED_AS
        self._known: dict[int, bytes] = {}

    def __call__(self, value: object) -> bytes:
        """``value`` must outlive this object: it is known by its id."""
        reference = self._known.get(id(value))
        if reference is None:
            # pushed and dropped, only to be remembered: what is encoded again refers to it
            self._head.append(self._encoded(value) + pickle.POP)
            reference = self._known[id(value)] = self._encoded(value)
        return reference

    @property
    def num_remembered(self) -> int:
        """How many of the unpickler's memories are taken."""
        return len(self._pickler.memo.copy())

    def head(self) -> bytes:
        """What the pickle begins with."""
        return b"".join(self._head)

    def _encoded(self, value: object) -> bytes:
        self._file.seek(0)
        self._file.truncate()
        self._pickler.dump(value)
        return self._file.getvalue()[2:-1]  # without PROTO and STOP


class _Strings(dict[str, bytes]):
    """The opcodes that push a string, in full for the first time and as a reference from then on; to be
    written in the order in which they were asked for."""

    def __init__(self, first_memory: int) -> None:
        super().__init__()
        self._first_memory = first_memory
        self.numbers = _Numbers()

    def __missing__(self, text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")  # as pickle does
        memory = (self._first_memory + len(self)).to_bytes(4, "little")
        self[text] = pickle.LONG_BINGET + memory
        return pickle.BINUNICODE + len(raw).to_bytes(4, "little") + raw + pickle.LONG_BINPUT + memory

    def path(self, path: Sequence[str | int]) -> bytes:
        """A tuple of strings and indices."""
        pushed = [self[part] if type(part) is str else self.numbers[part] for part in path]
        if 0 < len(path) <= len(_SHORT_TUPLES):
            return b"".join(pushed) + _SHORT_TUPLES[len(path) - 1]
        return pickle.MARK + b"".join(pushed) + pickle.TUPLE


_SHORT_TUPLES = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


class _Numbers(dict[Any, bytes]):
    """The opcodes that push a number or None."""

    def __missing__(self, value: int | None) -> bytes:
        opcodes = self[value] = pickle.dumps(value, _PROTOCOL)[2:-1]
        return opcodes


def _entry(constants: _Constants, entry: STORAGE_TYPES) -> bytes:
    """An object of its own for each name, since a reader may change its list of chunks; what is no tensor has
    nothing to change."""
    if type(entry) is not TensorStorageMetadata:
        return constants(entry)
    chunks = b"".join(map(constants, entry.chunks))
    listed = pickle.EMPTY_LIST + pickle.MARK + chunks + pickle.APPENDS
    fields = (
        constants(key) + (listed if key == "chunks" else constants(value))
        for key, value in vars(entry).items()
    )
    return constants(TensorStorageMetadata) + _NEW + b"".join(fields) + _BUILT


def _chunk_heads(constants: _Constants, entry: STORAGE_TYPES) -> list[bytes]:
    """Per chunk, what stands between its name and that of its file."""
    chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else None
    numbers = _Numbers()
    info = _BUILT + constants(_StorageInfo) + _NEW + constants("relative_path")
    offset, index = constants("offset"), constants("index")
    if chunks is None:
        return [offset + numbers[None] + index + numbers[None] + info]
    return [
        offset + constants(chunk.offsets) + index + numbers[number] + info
        for number, chunk in enumerate(chunks)
    ]


class _Items:
    """storage_data: MetadataIndex -> _StorageInfo."""

    def __init__(self, constants: _Constants, heads: Sequence[Sequence[bytes]]) -> None:
        """``heads``: per group, of its chunks."""
        self._start = constants(MetadataIndex) + _NEW + constants("fqn")
        self._offset, self._length = constants("offset"), constants("length")
        self._heads = heads

    def encoded(self, strings: _Strings, groups: Sequence[Group]) -> Iterator[bytes]:
        # asked for once per chunk, and there are as many as ranks
        file_name = cache(lambda key: file_of(key, _PLACEHOLDER))
        start, numbers, offset_key, length_key = self._start, strings.numbers, self._offset, self._length
        for group, heads in zip(groups, self._heads, strict=True):
            for name, places in zip(group.names, group.places, strict=True):
                pushed = start + strings[name]
                for head, (file, offset, length) in zip(heads, places, strict=True):
                    # fmt: off
                    yield b"".join((
                        pushed, head, strings[file_name(file)],
                        offset_key, numbers[offset], length_key, numbers[length], _BUILT,
                    ))
                    # fmt: on
