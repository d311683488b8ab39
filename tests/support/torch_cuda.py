"""torch's own face of CUDA, faked: what TorchBackend calls of it, and what it was when it was called.

Enters: calls of ``torch.cuda`` and ``torch.accelerator``. Leaves: a list of them, each with the device that
was current, and the states of a fake runtime. Streams and events run nothing: accelerator.py has those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcp_async.staging.device import cuda_runtime
from tests.support.cuda_library import FakeCudaLibrary


class FakeTorchCuda:
    """Two devices."""

    def __init__(self) -> None:
        self.library = FakeCudaLibrary()
        self.calls: list[tuple[str, int]] = []
        """(what, index of the current device)"""
        self.current_device = 0
        self.capturing: set[int] = set()
        """On which devices the current stream is being captured."""
        self.is_lost = False
        self.own_streams: list[Any] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch be this."""
        monkeypatch.setattr(cuda_runtime, "library", lambda: self.library)
        monkeypatch.setattr(torch.accelerator, "device_index", self._on_device)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: self.current_device)
        monkeypatch.setattr(torch.cuda, "device", lambda device: self._on_device(device.index))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", self._is_capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._stream(device, "current"))
        monkeypatch.setattr(torch.cuda, "Stream", self._pooled_stream)
        monkeypatch.setattr(torch.cuda, "ExternalStream", self._external_stream)
        monkeypatch.setattr(torch.cuda, "Event", self._event)
        monkeypatch.setattr(torch.cuda, "stream", self._with_stream)

    def note(self, what: str) -> None:
        self.calls.append((what, self.current_device))

    @contextlib.contextmanager
    def _on_device(self, index: int | None) -> Iterator[None]:
        if self.is_lost:
            raise RuntimeError("CUDA error: the device is lost")
        before, self.current_device = self.current_device, self.current_device if index is None else index
        try:
            yield
        finally:
            self.current_device = before

    def _is_capturing(self) -> bool:
        return self.current_device in self.capturing

    def _stream(self, device: torch.device, name: str) -> Any:
        def synchronize() -> None:
            raise AssertionError("it would spin until the queue is empty")

        return SimpleNamespace(device=device, name=name, synchronize=synchronize)

    def _pooled_stream(self, device: torch.device) -> Any:
        """One that others are given as well."""
        return self._new_stream(device, "pooled stream")

    def _external_stream(self, handle: int, device: torch.device) -> Any:
        assert device.index == self.current_device, "it was made on another device"
        return self._new_stream(device, "new stream")

    def _new_stream(self, device: torch.device, kind: str) -> Any:
        self.note(kind)
        self.own_streams.append(self._stream(device, f"own {len(self.own_streams)}"))
        return self.own_streams[-1]

    def _event(self, blocking: bool = False) -> Any:
        assert blocking, "whoever waits for it would spin"

        def synchronize() -> None:
            self.library.wait()
            self.note("synchronize")

        return SimpleNamespace(
            record=lambda stream: self.note(f"record {stream.name}"),
            wait=lambda stream: self.note(f"wait {stream.name}"),
            synchronize=synchronize,
        )

    @contextlib.contextmanager
    def _with_stream(self, stream: Any) -> Iterator[None]:
        self.note(f"with {stream.name}")
        yield
