"""Which checkpoints exist and are whole, what an opened one holds, which may go."""

from __future__ import annotations

from .catalog import Catalog
from .contents import Contents
from .decoding import UnfitMetadataError
from .opened import Opened
from .opening import last_number
from .reference import reference
from .safetensors_source import Model, SafetensorsOpener, model_at

__all__ = [
    "Catalog",
    "Contents",
    "Model",
    "Opened",
    "SafetensorsOpener",
    "UnfitMetadataError",
    "last_number",
    "model_at",
    "reference",
]
