"""Bytes to media, by the protocols of base.py; knows no tensor, no pickle and no format."""

from __future__ import annotations

from .base import (
    Copies,
    Glimpse,
    Glimpses,
    InUseError,
    LinkError,
    Listing,
    NamesUids,
    NamingTransaction,
    ReadableStorage,
    Reader,
    SharedTransaction,
    SharingStorage,
    Storage,
    StoredCheckpoint,
    Transaction,
    UnreadableError,
    gives_public_names,
    is_sharing,
    turn_to_copy,
)
from .calls import BlockingCalls
from .deadline import LimitedStorage
from .local import LocalPlace, LocalReader, LocalStorage
from .memory import MemoryStorage
from .object_store import Finding, ObjectStorage, Retries
from .tiered import CopyChunk, CopyPlan, Outcome, Replicator, TieredStorage
from .urls import root_and_name, storage_at

__all__ = [
    "BlockingCalls",
    "Copies",
    "CopyChunk",
    "CopyPlan",
    "Finding",
    "Glimpse",
    "Glimpses",
    "InUseError",
    "LimitedStorage",
    "LinkError",
    "Listing",
    "LocalPlace",
    "LocalReader",
    "LocalStorage",
    "MemoryStorage",
    "NamesUids",
    "NamingTransaction",
    "ObjectStorage",
    "Outcome",
    "ReadableStorage",
    "Reader",
    "Replicator",
    "Retries",
    "SharedTransaction",
    "SharingStorage",
    "Storage",
    "StoredCheckpoint",
    "TieredStorage",
    "Transaction",
    "UnreadableError",
    "gives_public_names",
    "is_sharing",
    "root_and_name",
    "storage_at",
    "turn_to_copy",
]
