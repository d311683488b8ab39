"""Accelerators: what is needed of them, and torch's; nothing else queues work on a device."""

from __future__ import annotations

from .backend import Backend, CaptureInProgressError, Event, Purpose, Stream
from .torch_backend import PlainStream, TorchBackend

__all__ = ["Backend", "CaptureInProgressError", "Event", "PlainStream", "Purpose", "Stream", "TorchBackend"]
