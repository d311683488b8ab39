"""Host memory that is staged in: slots, leases, and what a device knows of them."""

from __future__ import annotations

from .arena import Arena, touch
from .bounce import Bounce
from .buffer_pool import BufferPool, Lease
from .pinning import Pinner

__all__ = ["Arena", "Bounce", "BufferPool", "Lease", "Pinner", "touch"]
