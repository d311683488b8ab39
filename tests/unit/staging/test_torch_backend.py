"""TorchBackend against a fake of torch's faces: which device, which stream, which kind of event, what falls
back to a plain copy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dcp_async.staging.device import CaptureInProgressError, PlainStream, TorchBackend
from tests.support.cuda_library import GLOBAL
from tests.support.doubles import random_tensor
from tests.support.torch_cuda import FakeTorchCuda

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
ADDRESS, NBYTES = 0x7F0000000000, 1 << 20


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeTorchCuda:
    cuda = FakeTorchCuda()
    cuda.install(monkeypatch)
    return cuda


def in_a_thread(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


def test_a_stream_is_made_once_per_device_and_purpose(cuda: FakeTorchCuda) -> None:
    backend = TorchBackend()
    for _ in range(3):
        streams = {backend.stream(device, "save") for device in (FIRST, SECOND)}
        streams.add(backend.stream(SECOND, "load"))
    assert len(streams) == len(cuda.own_streams) == 3
    assert cuda.calls == [("new stream", 0), ("new stream", 1), ("new stream", 1)]


def test_a_stream_of_ours_is_given_to_nobody_else(cuda: FakeTorchCuda) -> None:
    # out of torch's pool the trainer would be given it as well, and capture a graph there
    TorchBackend().stream(SECOND, "save")
    assert cuda.calls == [("new stream", 1)]
    assert cuda.library.num_streams == 1


def test_a_stream_that_can_not_be_made_is_one_of_torch_s(cuda: FakeTorchCuda) -> None:
    cuda.library.refuses_streams = True
    TorchBackend().stream(SECOND, "save")
    assert cuda.calls == [("pooled stream", 1)]
    cuda.library.launch()  # no error is left for the next kernel


def test_copies_marks_and_waits_are_made_with_their_device_current(cuda: FakeTorchCuda) -> None:
    backend = TorchBackend()
    stream = backend.stream(SECOND, "save")
    source, target = torch.ones(3), torch.zeros(3)
    stream.wait_event(backend.record(SECOND))
    stream.copy([target], [source])
    stream.synchronize()
    assert torch.equal(source, target)
    assert cuda.calls[1:] == [
        *[("record current", 1), ("wait own 0", 1), ("with own 0", 1)],
        *[("record own 0", 1), ("synchronize", 1)],
    ]
    assert cuda.current_device == 0


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def kernel_of_cuda(targets: list[torch.Tensor], sources: list[torch.Tensor], **_: Any) -> None:
    """As ``_foreach_copy_`` copies within a device."""
    if not {tensor.dtype for tensor in sources} <= KNOWN_TO_THE_KERNEL:
        raise NotImplementedError('"foreach_tensor_copy" not implemented')
    for target, source in zip(targets, sources, strict=True):
        narrow = source.is_floating_point() and source.dtype.itemsize < 4
        target.copy_(source.float() if narrow else source)


KNOWN_TO_THE_KERNEL = {
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}


@pytest.mark.parametrize("dtype", [*NARROW, torch.uint16, torch.uint32, torch.uint64, torch.float8_e8m0fnu])
def test_every_bit_of_a_batch_on_the_device_is_copied(
    cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    sources = [random_tensor(dtype, (size,), seed=size) for size in (300, 5)]
    targets = [torch.zeros_like(source) for source in sources]
    monkeypatch.setattr(torch, "_foreach_copy_", kernel_of_cuda)
    TorchBackend().stream(FIRST, "save").copy(targets, sources)
    assert [target.view(torch.uint8).tolist() for target in targets] == [
        source.view(torch.uint8).tolist() for source in sources
    ]


def test_a_capture_is_asked_of_the_device_in_question_and_refused_by_name(cuda: FakeTorchCuda) -> None:
    backend = TorchBackend()
    cuda.capturing = {1}
    backend.record(FIRST)
    with pytest.raises(CaptureInProgressError, match="captured"):
        backend.record(SECOND)
    cuda.current_device = 1
    backend.record(FIRST)


def test_marking_a_queue_leaves_the_callers_capture_mode(cuda: FakeTorchCuda) -> None:
    TorchBackend().record(FIRST)
    assert cuda.library.mode == GLOBAL


def test_a_wait_beside_a_graph_capture_does_not_disturb_it(cuda: FakeTorchCuda) -> None:
    backend = TorchBackend()
    event = backend.stream(FIRST, "save").record()
    with cuda.library.capture(GLOBAL):
        in_a_thread(event.synchronize)


def test_pin_and_unpin_make_no_context_on_another_device(
    cuda: FakeTorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    register, unregister = cuda.library.cudaHostRegister, cuda.library.cudaHostUnregister

    def noted(what: str, call: Callable[..., int]) -> Callable[..., int]:
        def noting(*args: Any) -> int:
            cuda.note(what)
            return call(*args)

        return noting

    monkeypatch.setattr(cuda.library, "cudaHostRegister", noted("pin", register))
    monkeypatch.setattr(cuda.library, "cudaHostUnregister", noted("unpin", unregister))
    backend = TorchBackend()
    assert backend.pin(SECOND, ADDRESS, NBYTES)
    backend.unpin(SECOND, ADDRESS)
    assert cuda.calls == [("pin", 1), ("unpin", 1)]


def test_unpin_of_a_device_that_is_lost_does_not_raise(
    cuda: FakeTorchCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.is_lost = True
    TorchBackend().unpin(SECOND, ADDRESS)
    assert "stays registered" in caplog.text


def test_a_device_without_an_index_is_the_callers_current_one(cuda: FakeTorchCuda) -> None:
    cuda.current_device = 1
    backend = TorchBackend()
    assert backend.resolve("cuda") == SECOND
    assert backend.resolve("cuda:0") == FIRST
    assert backend.resolve("cpu") == torch.device("cpu")


def test_memory_is_pinned_for_cuda_alone(cuda: FakeTorchCuda) -> None:
    backend = TorchBackend()
    for kind in ("xpu", "mps", "hpu"):
        assert not backend.can_pin(torch.device(kind, 0))
        assert not backend.pin(torch.device(kind, 0), ADDRESS, NBYTES)
    assert cuda.library.registered == {}


class Kinds:
    """Devices of another kind, whose module counts how often it was waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accelerator: str | None) -> None:
        self.num_waits = 0
        self.num_attempts = 0
        current = None if accelerator is None else torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: current)
        monkeypatch.setattr(torch, "Stream", self._no_stream)
        module = SimpleNamespace(synchronize=self._wait)
        monkeypatch.setattr(torch, "get_device_module", lambda device: module)

    def _wait(self) -> None:
        self.num_waits += 1

    def _no_stream(self, device: torch.device) -> None:
        self.num_attempts += 1
        raise NotImplementedError("Backend doesn't support create a new Stream.")


@pytest.mark.parametrize(("kind", "accelerator"), [("xpu", "xpu"), ("mps", "mps"), ("hpu", None)])
def test_a_device_that_gives_no_stream_is_copied_from_plainly_after_the_callers_work(
    monkeypatch: pytest.MonkeyPatch, kind: str, accelerator: str | None
) -> None:
    kinds, device, backend = Kinds(monkeypatch, accelerator), torch.device(kind, 0), TorchBackend()
    source, target = torch.ones(3), torch.zeros(3)
    event = backend.record(device)
    assert kinds.num_waits == 1, "what the caller queued is done before save() returns"
    stream = backend.stream(device, "save")
    assert isinstance(stream, PlainStream)
    stream.wait_event(event)
    stream.copy([target], [source.requires_grad_()])
    assert kinds.num_waits == 2
    assert torch.equal(target, source)
    assert not target.requires_grad, "the state's autograd graph is kept"
    backend.lend([target], device)
    assert kinds.num_attempts <= 1, "a kind of device is asked once"


def test_a_device_of_another_kind_that_gives_streams_is_copied_from_on_one_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By torch's generic classes; nothing of CUDA is called."""
    calls: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.name = "own" if device.index is not None else "asked for"

        def __enter__(self) -> None:
            calls.append(f"with {self.name}")

        def __exit__(self, *_: object) -> None:
            pass

    class Event:
        def __init__(self, device: torch.device) -> None:
            pass

        def record(self, stream: Stream) -> None:
            calls.append(f"record {stream.name}")

        def wait(self, stream: Stream) -> None:
            calls.append(f"wait {stream.name}")

        def synchronize(self) -> None:
            calls.append("synchronize")

    device = torch.device("xpu", 0)
    current = Stream(device)
    current.name = "current"
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: contextlib.nullcontext())
    backend = TorchBackend()
    source, target = torch.ones(3), torch.zeros(3)
    event = backend.record(device)
    stream = backend.stream(device, "save")
    stream.wait_event(event)
    stream.copy([target], [source])
    stream.synchronize()
    assert torch.equal(target, source)
    assert calls == [
        *["record asked for", "record current", "wait own", "with own"],
        *["record own", "synchronize"],
    ]
