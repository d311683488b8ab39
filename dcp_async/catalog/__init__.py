"""Which checkpoints exist and are whole, what an opened one holds, which may go."""

from __future__ import annotations

from .catalog import Catalog
from .contents import Contents
from .decoding import UnfitMetadataError
from .opened import Opened
from .opening import last_number
from .reference import reference

__all__ = [
    "Catalog",
    "Contents",
    "Opened",
    "UnfitMetadataError",
    "last_number",
    "reference",
]
