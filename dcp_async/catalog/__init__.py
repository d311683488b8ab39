"""Which checkpoints exist and are whole, what an opened one holds, which may go."""

from __future__ import annotations

from .catalog import Catalog
from .contents import Contents
from .decoding import UnfitMetadataError
from .opened import Opened
from .opening import last_number
from .path_opener import PathOpener
from .reference import is_path, reference
from .safetensors_source import is_model_file

__all__ = [
    "Catalog",
    "Contents",
    "Opened",
    "PathOpener",
    "UnfitMetadataError",
    "is_model_file",
    "is_path",
    "last_number",
    "reference",
]
