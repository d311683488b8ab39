"""One DCP item: a STORED zip that ``torch.load`` accepts, made by hand; and what stock's zips say of
themselves.

Enters: a dtype and a shape, or pickled bytes. Leaves: the constant bytes before and after a tensor's payload
(pure functions of dtype and shape, so they are made once per plan), or a whole item padded to its slot. From
stock's items: where the first record lies, and whether the CRC-32s hold.
CRC fields are 0, as under torch's own ``set_crc32_options(False)``: no reader of torch checks them, and
computing them would cost a pass over the payload (docs/adr/0005).
Source: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import itemgetter

import torch

from .._geometry import contiguous_strides

_PREFIX = b"archive/"
_UTF8 = 0x0800
_LIMIT32 = 0xFFFFFFFF
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")

# Storage classes that torch pickles a tensor's bytes under; dtypes younger than typed storages name
# UntypedStorage instead.
_STORAGE_CLASS = {
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.int16: "ShortStorage",
    torch.int32: "IntStorage",
    torch.int64: "LongStorage",
    torch.bool: "BoolStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}
_UNTYPED = frozenset(
    {
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    }
)
PLAIN_DTYPES = frozenset(_STORAGE_CLASS) | _UNTYPED
"""dtypes whose items are made by hand; tensors of any other go through ``torch.save``."""


def _local_header(name: bytes, size: int) -> bytes:
    big = size >= _LIMIT32
    extra = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
    size32 = _LIMIT32 if big else size
    return _LOCAL.pack(b"PK\3\4", 0, _UTF8, 0, 0, 0, 0, size32, size32, len(name), len(extra)) + name + extra


def _central_entry(name: bytes, size: int, offset: int) -> bytes:
    wide = [value for value in (size, size, offset) if value >= _LIMIT32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size32 = min(size, _LIMIT32)
    fields = (
        0,
        0,
        _UTF8,
        0,
        0,
        0,
        0,
        size32,
        size32,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        min(offset, _LIMIT32),
    )
    return _CENTRAL.pack(b"PK\1\2", *fields) + name + extra


def _directory(entries: Sequence[bytes], offset: int) -> bytes:
    """Central directory and its end record, to be placed at ``offset`` of the item."""
    body = b"".join(entries)
    end = b""
    if offset + len(body) >= _LIMIT32:
        end += _END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, len(entries), len(entries), len(body), offset)
        end += _LOCATOR64.pack(b"PK\6\7", 0, offset + len(body), 1)
    end += _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(body), min(offset, _LIMIT32), 0)
    return body + end


def _pickle_int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + struct.pack("<B", len(raw)) + raw


def _pickle_str(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _pickle_ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_pickle_int, values)) + b"t"


def _tensor_pickle(dtype: torch.dtype, shape: Sequence[int], nbytes: int, numel: int) -> bytes:
    """``data.pkl`` of a row-major tensor, protocol 2, as ``torch.save`` would rebuild it."""
    typed = _STORAGE_CLASS.get(dtype)
    rebuild = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
    storage = f"ctorch\n{typed}\n" if typed else "ctorch.storage\nUntypedStorage\n"
    persistent_id = (
        b"("
        + _pickle_str("storage")
        + storage.encode()
        + _pickle_str("0")
        + _pickle_str("cpu")
        + _pickle_int(numel if typed else nbytes)
        + b"tQ"
    )
    args = persistent_id + _pickle_int(0) + _pickle_ints(shape) + _pickle_ints(contiguous_strides(shape))
    args += b"\x89" + b"ccollections\nOrderedDict\n)R"
    if not typed:
        args += f"c{str(dtype).replace('.', chr(10), 1)}\n".encode()
    return b"\x80\x02" + f"ctorch._utils\n{rebuild}\n".encode() + b"(" + args + b"tR."


@lru_cache(maxsize=4096)
def tensor_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """The constant bytes before and after the payload of a row-major tensor item.

    Args: ``dtype`` one of PLAIN_DTYPES; ``shape`` of the chunk.
    """
    numel = 1
    for extent in shape:
        numel *= extent
    nbytes = numel * dtype.itemsize
    head = b""
    entries = []
    for name, content in (
        (_PREFIX + b"data.pkl", _tensor_pickle(dtype, shape, nbytes, numel)),
        (_PREFIX + b"version", b"3\n"),
        (_PREFIX + b"byteorder", b"little"),
    ):
        entries.append(_central_entry(name, len(content), len(head)))
        head += _local_header(name, len(content)) + content
    name = _PREFIX + b"data/0"
    entries.append(_central_entry(name, nbytes, len(head)))
    head += _local_header(name, nbytes)
    return head, _directory(entries, len(head) + nbytes)


def object_item(pickled: bytes) -> bytes:
    """An item whose ``torch.load`` gives the object of ``pickled`` (protocol 2, no tensors inside)."""
    body = b""
    entries = []
    for name, content in (
        (_PREFIX + b"data.pkl", pickled),
        (_PREFIX + b"version", b"3\n"),
        (_PREFIX + b"byteorder", b"little"),
    ):
        entries.append(_central_entry(name, len(content), len(body)))
        body += _local_header(name, len(content)) + content
    return body + _directory(entries, len(body))


def _split(item: bytes) -> tuple[int, bytes, int]:
    """(offset of the central directory, its bytes, number of entries) of a zip without a comment."""
    _, _, _, _, count, size, offset, _ = _END.unpack_from(item, len(item) - _END.size)
    if offset == _LIMIT32 or size == _LIMIT32 or count == 0xFFFF:
        raise ValueError("an item of 4 GiB or 65,535 records has no room for padding")
    return offset, item[offset : offset + size], count


def slot_bytes(item_bytes: int, quantum: int) -> int:
    """The slot, a multiple of ``quantum``, that an item of ``item_bytes`` is padded to."""
    name = len(_PREFIX) + len(b".pad")
    return -(-(item_bytes + _LOCAL.size + _CENTRAL.size + 2 * name) // quantum) * quantum


def pad_item(item: bytes, slot: int) -> bytes:
    """``item`` grown to exactly ``slot`` bytes by a stored padding record, which torch ignores.

    Bytes behind the zip's end would not do: stock refuses them. Offsets then stay where they are when a
    counter grows.
    """
    at, entries, count = _split(item)
    name = _PREFIX + b".pad"
    fixed = at + _LOCAL.size + len(name) + len(entries) + _CENTRAL.size + len(name) + _END.size
    padding = slot - fixed
    if padding < 0:
        raise ValueError(f"an item of {len(item)} bytes does not fit a slot of {slot}")
    directory_at = at + _LOCAL.size + len(name) + padding
    end = _END.pack(
        b"PK\5\6", 0, 0, count + 1, count + 1, len(entries) + _CENTRAL.size + len(name), directory_at, 0
    )
    return b"".join(
        (
            item[:at],
            _local_header(name, padding),
            bytes(padding),
            entries,
            _central_entry(name, padding, at),
            end,
        )
    )


def pickle_start(head: bytes) -> int | None:
    """Where the pickle of a zip begins, given its first bytes; None if the pickle is not its first record."""
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        return None
    *_, name_bytes, extra_bytes = _LOCAL.unpack_from(head)
    name = head[_LOCAL.size :][:name_bytes]
    return _LOCAL.size + name_bytes + extra_bytes if name.endswith(b"/data.pkl") else None


def check_records(item: memoryview, *, crcs: bool) -> None:
    """Whether the directory of a whole zip lists its records as every reader understands them: stored, each
    once and apart from the others, and the pickle first if the first record claims to be it.

    With ``crcs`` they must match the CRC-32s that their writer recorded: those that are not 0.
    Raises: ValueError, naming the record; or if the zip's directory makes no sense.
    """
    try:
        records = list(_records(item))
    except (struct.error, OverflowError) as error:
        raise ValueError(f"its zip has a damaged directory: {error}") from error
    # torch finds names regardless of case
    if len({name.casefold() for name, *_ in records}) < len(records):
        raise ValueError("its zip has a record twice")
    end = 0
    for name, header, _, start, nbytes in sorted(records, key=itemgetter(1)):
        if header < end:
            raise ValueError(f"its record {name} overlaps another")
        end = start + nbytes
    first = next((name for name, header, *_ in records if header == 0), "")
    pickles = [name for name, *_ in records if name.casefold().endswith("/data.pkl")]
    if pickle_start(bytes(item[:_FIRST_BYTES])) is not None and pickles != [first]:
        raise ValueError("its zip has another pickle than its first record")
    for name, _, crc, start, nbytes in records:
        if crcs and crc and zlib.crc32(item[start : start + nbytes]) != crc:
            raise ValueError(f"its record {name} does not match its CRC-32")


_FIRST_BYTES = _LOCAL.size + 0xFFFF
"""A record's header with the longest name there is."""


def _records(item: memoryview) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, its header, CRC-32, first byte, length) of each record."""
    at, count = _find_directory(item)
    for _ in range(count):
        fields = _CENTRAL.unpack_from(item, at)
        magic, method, crc = fields[0], fields[4], fields[7]
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = bytes(item[at + _CENTRAL.size :][:name_bytes]).decode(errors="replace")
        wide = _wide_values(bytes(item[at + _CENTRAL.size + name_bytes :][:extra_bytes]))
        size, packed, header = (
            next(wide, -1) if value == _LIMIT32 else value for value in (fields[9], fields[8], fields[16])
        )
        at += _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
        if magic != b"PK\1\2" or size < 0 or not 0 <= header < len(item):
            raise ValueError(f"its zip has a damaged directory, at record {name}")
        if method or size != packed:  # torch never deflates; what does may inflate to any length
            raise ValueError(f"its record {name} is compressed")
        local = _LOCAL.unpack_from(item, header)
        start = header + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\3\4" or start + size > len(item):
            raise ValueError(f"its record {name} lies outside of it")
        yield name, header, crc, start, size


def _find_directory(item: memoryview) -> tuple[int, int]:
    """(offset of the central directory, number of entries); the end record may have a comment behind it."""
    before = max(len(item) - _END.size - 0xFFFF, 0)
    at = bytes(item[before:]).rfind(b"PK\5\6")
    if at < 0:
        raise ValueError("its zip has no end record, as if it was cut off")
    at += before
    *_, count, _, offset, _ = _END.unpack_from(item, at)
    locator = at - _LOCATOR64.size
    if locator >= 0 and bytes(item[locator : locator + 4]) == b"PK\6\7":  # stock's zips of any size have one
        end64 = _LOCATOR64.unpack_from(item, locator)[2]
        *_, count, _, offset = _END64.unpack_from(item, end64)
    return offset, count


def _wide_values(extra: bytes) -> Iterator[int]:
    """What a central entry's zip64 field holds: of full size, packed size and offset those that 32 bits do
    not."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            yield from struct.unpack_from(f"<{length // 8}Q", extra, 4)
        extra = extra[4 + length :]
