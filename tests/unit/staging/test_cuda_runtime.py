"""Calls of the CUDA runtime: a refusal leaves nothing behind, and nobody's graph capture is disturbed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from dcp_async.staging.device import cuda_runtime
from tests.support.cuda_library import GLOBAL, NOT_REGISTERED, THREAD_LOCAL, FakeCudaLibrary

ADDRESS, NBYTES = 0x7F0000000000, 1 << 20
PORTABLE = 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeCudaLibrary:
    library = FakeCudaLibrary()
    monkeypatch.setattr(cuda_runtime, "library", lambda: library)
    return library


def in_a_thread(work: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def test_memory_is_pinned_for_all_devices(library: FakeCudaLibrary) -> None:
    assert cuda_runtime.register(ADDRESS, NBYTES)
    assert library.registered == {ADDRESS: (NBYTES, PORTABLE)}
    cuda_runtime.unregister(ADDRESS)
    assert library.registered == {}


def test_a_refused_pin_leaves_no_error_for_the_next_kernel(library: FakeCudaLibrary) -> None:
    library.refuses = True
    assert not cuda_runtime.register(ADDRESS, NBYTES)
    library.launch()


def test_memory_that_is_pinned_already_is_refused_and_leaves_no_error(library: FakeCudaLibrary) -> None:
    assert cuda_runtime.register(ADDRESS, NBYTES)
    assert not cuda_runtime.register(ADDRESS, NBYTES)
    library.launch()


def test_unpinning_what_is_not_pinned_neither_raises_nor_leaves_an_error(
    library: FakeCudaLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    cuda_runtime.unregister(ADDRESS)
    library.launch()
    assert str(NOT_REGISTERED) in caplog.text


def test_pins_and_waits_beside_a_graph_capture_disturb_nothing(library: FakeCudaLibrary) -> None:
    def beside() -> None:
        with cuda_runtime.relaxed_capture():
            assert cuda_runtime.register(ADDRESS, NBYTES)
            library.wait()
            cuda_runtime.unregister(ADDRESS)

    with library.capture(GLOBAL):
        in_a_thread(beside)


def test_a_capture_is_lost_by_a_pin_of_a_thread_that_is_not_relaxed(library: FakeCudaLibrary) -> None:
    """What the fake says of a package that does not care."""

    def beside() -> None:
        assert not cuda_runtime.register(ADDRESS, NBYTES)

    with pytest.raises(RuntimeError, match="invalidated"), library.capture(GLOBAL):
        in_a_thread(beside)


def test_a_threads_capture_mode_is_put_back(library: FakeCudaLibrary) -> None:
    """It may be the trainer's: CUDA would let it do in its own captures what spoils them."""
    with cuda_runtime.relaxed_capture():
        pass
    assert library.mode == GLOBAL
    with pytest.raises(RuntimeError, match="900"), library.capture(THREAD_LOCAL):
        library.wait()


def test_a_pin_without_the_library_is_asked_for_in_a_thread_whose_last_error_ends_with_it(
    library: FakeCudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_runtime, "library", lambda: None)
    library.refuses = True
    devices: list[int] = []

    @contextlib.contextmanager
    def on_device(index: int) -> Iterator[None]:
        devices.append(index)
        yield

    def register(address: int, nbytes: int, flags: int) -> int:
        return library.cudaHostRegister(
            ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(flags)
        )

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", on_device)
    assert not cuda_runtime.register(ADDRESS, NBYTES)
    library.launch()
    assert devices == [3]
    assert threading.get_ident() not in library.callers
