"""One DCP item written by hand: a STORED zip that ``torch.load`` accepts.

Enters: a dtype and a shape, or pickled bytes. Leaves: the constant bytes before and after a tensor's payload
(pure functions of dtype and shape, so they are made once per plan), or a whole item padded to its room.
CRC fields are 0, as under torch's own ``set_crc32_options(False)``: no reader of torch checks them, and
computing them would cost a pass over the payload (docs/adr/0005).
Source: torch/serialization.py, caffe2/serialize/inline_container.cc.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from .._geometry import contiguous_strides

_PREFIX = b"archive/"
_UTF8 = 0x0800
LIMIT32 = 0xFFFFFFFF
LOCAL = struct.Struct("<4sHHHHHIIIHH")
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR64 = struct.Struct("<4sIQI")

# Storage classes that torch pickles a tensor's bytes under; dtypes younger than typed storages name
# UntypedStorage instead.
STORAGE_CLASS = {
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
_UNTYPED_NAMES = (
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
# by name: an older torch lacks the youngest of them
_UNTYPED = frozenset(getattr(torch, name) for name in _UNTYPED_NAMES if hasattr(torch, name))
PLAIN_DTYPES = frozenset(STORAGE_CLASS) | _UNTYPED
"""dtypes whose items are made by hand; tensors of any other go through ``torch.save``."""


def local_header(name: bytes, size: int, *, crc: int = 0, filler: bytes = b"") -> bytes:
    """What stands before a record. ``filler``: extra fields that mean nothing, to move what is behind."""
    big = size >= LIMIT32
    # both sizes, though they are equal: in a local header zip64's field must have the two
    extra = struct.pack("<HHQQ", 1, 16, size, size) if big else b""
    extra += filler
    size32 = LIMIT32 if big else size
    return LOCAL.pack(b"PK\3\4", 0, _UTF8, 0, 0, 0, crc, size32, size32, len(name), len(extra)) + name + extra


def central_entry(name: bytes, size: int, offset: int, *, crc: int = 0) -> bytes:
    """A record's entry in the directory; ``offset`` of its header."""
    # zip64's field has only what does not fit above, in this order
    wide = [value for value in (size, size, offset) if value >= LIMIT32]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    size32 = min(size, LIMIT32)
    fields = (
        0,
        0,
        _UTF8,
        0,
        0,
        0,
        crc,
        size32,
        size32,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        min(offset, LIMIT32),
    )
    return CENTRAL.pack(b"PK\1\2", *fields) + name + extra


def zip_directory(entries: Sequence[bytes], offset: int) -> bytes:
    """Central directory and its end record, to be placed at ``offset`` of the item."""
    body = b"".join(entries)
    end = b""
    if offset + len(body) >= LIMIT32 or len(entries) >= 0xFFFF:
        end += END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, len(entries), len(entries), len(body), offset)
        end += LOCATOR64.pack(b"PK\6\7", 0, offset + len(body), 1)
    few = min(len(entries), 0xFFFF)
    end += END.pack(b"PK\5\6", 0, 0, few, few, len(body), min(offset, LIMIT32), 0)
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
    typed = STORAGE_CLASS.get(dtype)
    rebuild = "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"
    storage = f"ctorch\n{typed}\n" if typed else "ctorch.storage\nUntypedStorage\n"
    persistent_id = (
        b"("
        + _pickle_str("storage")
        + storage.encode()
        + _pickle_str("0")
        # wherever the tensor lay: a load says where it goes
        + _pickle_str("cpu")
        + _pickle_int(numel if typed else nbytes)
        + b"tQ"
    )
    args = persistent_id + _pickle_int(0) + _pickle_ints(shape) + _pickle_ints(contiguous_strides(shape))
    # requires_grad is False: stock's writer detaches tensors as well
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
        # first, so that a load can judge an item by its first kilobyte
        (_PREFIX + b"data.pkl", _tensor_pickle(dtype, shape, nbytes, numel)),
        (_PREFIX + b"version", b"3\n"),
        (_PREFIX + b"byteorder", b"little"),
    ):
        entries.append(central_entry(name, len(content), len(head)))
        head += local_header(name, len(content)) + content
    name = _PREFIX + b"data/0"
    entries.append(central_entry(name, nbytes, len(head)))
    head += local_header(name, nbytes)
    return head, zip_directory(entries, len(head) + nbytes)


def object_item(pickled: bytes) -> bytes:
    """An item whose ``torch.load`` gives the object of ``pickled`` (protocol 2, no tensors inside)."""
    body = b""
    entries = []
    for name, content in (
        (_PREFIX + b"data.pkl", pickled),
        (_PREFIX + b"version", b"3\n"),
        (_PREFIX + b"byteorder", b"little"),
    ):
        entries.append(central_entry(name, len(content), len(body)))
        body += local_header(name, len(content)) + content
    return body + zip_directory(entries, len(body))


def _split(item: bytes) -> tuple[int, bytes, int]:
    """(offset of the central directory, its bytes, number of entries) of a zip without a comment."""
    _, _, _, _, count, size, offset, _ = END.unpack_from(item, len(item) - END.size)
    # then the real numbers are in a zip64 record, which would have to be moved as well
    if offset == LIMIT32 or size == LIMIT32 or count == 0xFFFF:
        raise ValueError("an item of 4 GiB or 65,535 records has no room for padding")
    return offset, item[offset : offset + size], count


def padded_bytes(item_bytes: int, quantum: int) -> int:
    """The room, a multiple of ``quantum``, that an item of ``item_bytes`` is padded to."""
    # it stands in the record's header and in the directory
    name = len(_PREFIX) + len(b".pad")
    return -(-(item_bytes + LOCAL.size + CENTRAL.size + 2 * name) // quantum) * quantum


def pad_item(item: bytes, room: int) -> bytes:
    """``item`` grown to exactly ``room`` bytes by a stored padding record, which torch ignores.

    Bytes behind the zip's end would not do: stock refuses them. Offsets then stay where they are when a
    counter grows.
    """
    directory_at, entries, count = _split(item)
    name = _PREFIX + b".pad"
    fixed = directory_at + LOCAL.size + len(name) + len(entries) + CENTRAL.size + len(name) + END.size
    padding = room - fixed
    if padding < 0:
        raise ValueError(f"an item of {len(item)} bytes does not fit a room of {room}")
    new_directory_at = directory_at + LOCAL.size + len(name) + padding
    end = END.pack(
        b"PK\5\6", 0, 0, count + 1, count + 1, len(entries) + CENTRAL.size + len(name), new_directory_at, 0
    )
    return b"".join(
        (
            item[:directory_at],
            local_header(name, padding),
            bytes(padding),
            entries,
            central_entry(name, padding, directory_at),
            end,
        )
    )
