"""This process's memory as a storage."""

from __future__ import annotations

from .storage import MemoryStorage

__all__ = [
    "MemoryStorage",
]
