"""Bytes to media, by the protocols of base.py; knows no tensor, no pickle and no format."""

from __future__ import annotations

from .base import (
    LinkError,
    Listing,
    NamesUids,
    Reader,
    Storage,
    StoredCheckpoint,
    Transaction,
    UnreadableError,
)
from .deadline import LimitedStorage
from .local import LocalReader, LocalStorage
from .memory import MemoryStorage
from .urls import storage_at

__all__ = [
    "LimitedStorage",
    "LinkError",
    "Listing",
    "LocalReader",
    "LocalStorage",
    "MemoryStorage",
    "NamesUids",
    "Reader",
    "Storage",
    "StoredCheckpoint",
    "Transaction",
    "UnreadableError",
    "storage_at",
]
