"""A bucket of S3, Google Cloud or Azure as a storage, by way of obstore."""

from __future__ import annotations

from .check import Finding
from .options import SCHEMES, Retries
from .storage import ObjectStorage

__all__ = [
    "SCHEMES",
    "Finding",
    "ObjectStorage",
    "Retries",
]
