"""`.metadata`: DCP's pickle of stock classes, encoded once per plan and reused with another uid in its file
names.

Enters: DCP's Metadata and where each item lies. Leaves: bytes that stock reads. Invariant: nothing but the
uid changes from
save to save until the layout does.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

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
    complete = dataclasses.replace(metadata, storage_data=storage_data, storage_meta=None)
    raw = pickle.dumps(complete, protocol=4)
    return MetadataTemplate(tuple(raw.split(_PLACEHOLDER.encode())))
