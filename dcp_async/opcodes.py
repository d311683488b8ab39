"""Walks over a pickle's opcodes without doing what they say.

Enters: pickled bytes of unknown origin. Leaves: where the pickle ends, or ValueError for one that would make
an unpickler take memory that its length does not justify. Pure. Python's unpicklers believe the numbers in a
pickle: five bytes that memorise something under a huge number cost gigabytes, and so does a length that
nothing follows.
"""

from __future__ import annotations

import re
from functools import lru_cache

_LINES = dict.fromkeys(b"FILSVgpP", 1) | dict.fromkeys(b"ci", 2)
"""Opcodes of text, and how many lines follow them."""
_COUNTED = dict.fromkeys(b"UC\x8a\x8c", 1) | dict.fromkeys(b"TBX\x8b", 4) | dict.fromkeys(b"\x8d\x8e\x96", 8)
"""Opcodes with a length, and how many bytes hold it."""
_PUT, _STOP = b"p."


@lru_cache(maxsize=8)
def _fixed(memo_high: int) -> re.Pattern[bytes]:
    """A run of opcodes of fixed length, which make up most of a pickle; memory is numbered below
    ``memo_high << 16``."""
    high = re.escape(bytes([0])) + b"-" + re.escape(bytes([memo_high]))
    return re.compile(
        rb"(?s:[(012NQRabdelostu)\]}\x81\x85-\x89\x8f-\x94\x97\x98]++|[Khq\x80\x82].|[M\x83]..|[Jj\x84]....|"
        rb"r..[" + high + rb"]\x00|[G\x95].{8})++"
    )


def end_of_pickle(raw: bytes | bytearray, at: int = 0) -> int:
    """Where the pickle that begins at ``at`` ends.

    Raises: ValueError if it does not end, or asks for more memory than fits its length.
    """
    # every remembered object takes two opcodes or more
    most = (len(raw) - at) // 2 + 1
    fixed = _fixed(min(most >> 16, 0xFF))
    while at < len(raw):
        if (run := fixed.match(raw, at)) is not None:
            at = run.end()
            if at == len(raw):
                break
        opcode = raw[at]
        at += 1
        if opcode == _STOP:
            return at
        if (width := _COUNTED.get(opcode)) is not None:
            nbytes = int.from_bytes(raw[at : at + width], "little")
            at += width + nbytes
        elif (lines := _LINES.get(opcode)) is not None:
            start = at
            for _ in range(lines):
                at = raw.find(b"\n", at) + 1
                if at == 0:
                    raise ValueError("the pickle was cut off")
            if opcode == _PUT and int(raw[start:at]) > most:
                raise ValueError("the pickle remembers more objects than it has")
        else:
            raise ValueError(f"the pickle has an opcode {opcode:#04x} that makes no sense there")
    raise ValueError("the pickle was cut off")
