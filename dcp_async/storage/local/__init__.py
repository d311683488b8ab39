"""A directory of a local or mounted file system as a storage."""

from __future__ import annotations

from .reader import LocalReader
from .storage import LocalStorage

__all__ = [
    "LocalReader",
    "LocalStorage",
]
