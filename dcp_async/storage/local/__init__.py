"""A directory of a local or mounted file system as a storage."""

from __future__ import annotations

from .files import sync, sync_directory
from .place import LocalPlace
from .reader import LocalReader
from .storage import LocalStorage

__all__ = [
    "LocalPlace",
    "LocalReader",
    "LocalStorage",
    "sync",
    "sync_directory",
]
