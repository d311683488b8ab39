"""A file of ``torch.save`` as a checkpoint of ours: staged and written from where it lies.

Enters: the file, mapped into memory. Leaves: a committed checkpoint, or nothing. Invariant: no tensor is
copied but into the slots that it is written from, and what was mapped meanwhile is given back.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch

from .._concurrency import drive
from ..catalog import archive_errors
from ..coordination import Coordination
from ..engine import CallOptions, DcpCalls, Directory
from ..errors import LoadError
from ..formats import Record, records_of_archive
from ..staging import StagingOptions
from ..trust import Trust, load_archived
from .call_resources import local_path

_UNIT_BYTES = 64 << 10
_MAX_PART_BYTES = 32 << 20
_CHECKED_BYTES = 8 << 20
"""How much of the file is looked at before its pages are given back."""


async def torch_save_to_dcp(
    torch_save_path: str | os.PathLike[str],
    dcp_checkpoint_dir: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    budget_bytes: int = 64 << 20,
) -> None:
    """Write what a file of ``torch.save`` holds as a checkpoint, which stock reads as well.

    It is in the structure of the file's dict: int keys, empty containers, ties, strides. It appears whole, in
    place of one in its directory, or not at all. First its bytes are compared with the CRC-32s that its
    writer recorded.

    Args:
        torch_save_path: the file; it holds a dict of names, and nobody changes it meanwhile.
        dcp_checkpoint_dir: the checkpoint's own directory; its parent must exist.
        trust: what the file's pickle may name, and then which leaves are accepted.
        budget_bytes: what is in memory at most of tensors, at least 1 MiB, beside a few KiB for each. Other
            leaves are in memory together.
    Raises: TypeError, ValueError; FileNotFoundError, OSError; CorruptCheckpointError,
        UntrustedCheckpointError, LoadError; SaveError, and then the directory is as it was.
    Cancellation: cancels the save.
    """
    if not isinstance(budget_bytes, int) or budget_bytes < 1 << 20:
        raise ValueError(f"budget_bytes={budget_bytes!r} must be a whole number of bytes, at least 1 MiB")
    path, directory = local_path(torch_save_path), local_path(dcp_checkpoint_dir)
    mapped = await anyio.to_thread.run_sync(_Mapped, path)
    # half for the slots that it is written from, half for what is mapped of the file meanwhile
    pool_bytes = budget_bytes // 2
    # whole blocks of checksums, as StagingOptions wants them
    part_bytes = min(pool_bytes // 4 // _UNIT_BYTES * _UNIT_BYTES, _MAX_PART_BYTES)
    options = CallOptions(
        coordination=Coordination(mode="local"),
        trust=trust,
        staging=StagingOptions(budget_bytes=pool_bytes, part_bytes=part_bytes),
        observer=mapped,
    )
    calls = DcpCalls(options, keeps=False)
    state = await anyio.to_thread.run_sync(mapped.load, trust)
    await drive("save", calls.saving(state, Directory.at(directory), overwrite=True), calls.inside)


class _Mapped:
    """A file of ``torch.save`` in memory that the system may take back; an Observer, so that it does."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            # private: torch wants memory that it might write to
            is_empty = os.fstat(file.fileno()).st_size == 0
            self._memory = None if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def load(self, trust: Trust) -> Mapping[str, Any]:
        """What the file holds, its tensors where they lie in it. Raises: CorruptCheckpointError,
        UntrustedCheckpointError, LoadError."""
        name = self._path.name
        with archive_errors(name):
            if self._memory is None:
                raise ValueError("it is empty")
            whole = memoryview(self._memory)
            records = records_of_archive(whole)
            # now, for all of them: a checkpoint of damaged bytes would vouch for them
            self._check(records.recorded())
            storages: dict[str, torch.UntypedStorage] = {}

            def memory(key: str, nbytes: int) -> torch.UntypedStorage:
                record = records.storage(key, nbytes)
                # one storage for all tensors that share it, so that ties are seen
                if key not in storages:
                    if nbytes:
                        flat = torch.frombuffer(whole, dtype=torch.uint8, count=nbytes, offset=record.start)
                    else:
                        flat = torch.empty(0, dtype=torch.uint8, device="cpu")
                    storages[key] = flat.untyped_storage()
                return storages[key]

            pickled = bytes(whole[records.pickle.start : records.pickle.stop])
            value = load_archived(pickled, trust, memory).value
        if not isinstance(value, dict):
            raise LoadError(
                f"{name!r}: it holds a {type(value).__name__}, not a dict of names", checkpoint_id=name
            )
        return value

    def _check(self, records: Sequence[Record]) -> None:
        """Raises ValueError for one whose bytes do not match their checksum."""
        assert self._memory is not None
        with memoryview(self._memory) as whole:
            for record in records:
                crc = 0
                for start in range(record.start, record.stop, _CHECKED_BYTES):
                    crc = zlib.crc32(whole[start : min(start + _CHECKED_BYTES, record.stop)], crc)
                    self._let_go()
                record.check(crc)

    def on_event(self, event: object) -> None:
        """A part was written: what was read of the file need not stay mapped, and is read again if wanted."""
        self._let_go()

    def _let_go(self) -> None:
        # the system could take them back at any time, but until then they count as memory of this process
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)
