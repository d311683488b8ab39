"""What a trainer does on whatever device torch has, or on the CPU in its place; for tests/gpu.

Enters: a device. Leaves: queues that are busy, streams, comparisons. Where the CPU plays the device nothing
is ever queued, and a test is left with what it says of bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from dcp_async.staging.device import TorchBackend
from tests.support.doubles import assert_same

Which = Literal["default", "side", "unordered side"]
"""The last one does not wait for what the stream before it has queued."""
_CYCLES_PER_MILLISECOND = 1_900_000
"""Of the fastest clock: a slower one keeps busy for longer."""


class CountingBackend(TorchBackend):
    """Notes what is pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pins: list[tuple[int, int, bool]] = []
        """(address, number of bytes, whether it was granted)"""

    def pin(self, device: torch.device, address: int, nbytes: int) -> bool:
        granted = super().pin(device, address, nbytes)
        self.pins.append((address, nbytes, granted))
        return granted


def elements(device: torch.device) -> int:
    """How many a case of some size has: a million, or on the CPU fewer."""
    return 1 << (14 if device.type == "cpu" else 20)


def keep_busy(device: torch.device, milliseconds: float) -> None:
    """The current stream is at this for so long."""
    if device.type == "cuda":
        torch.cuda._sleep(int(milliseconds * _CYCLES_PER_MILLISECOND))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def on_stream(device: torch.device, which: Which) -> Iterator[None]:
    """With the default stream, or one of the trainer's own, as the current one."""
    if device.type != "cuda" or which == "default":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    if which == "side":
        stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()


def on_host(value: Any) -> Any:
    """Whole tensors in host memory, of DTensors as well."""
    if not isinstance(value, torch.Tensor):
        return value
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().to("cpu", copy=True).resolve_conj().resolve_neg()


def assert_equal(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """Bit for bit, wherever they lie."""
    assert_same(list(map(on_host, found)), list(map(on_host, expected)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> None:
    """One step on ones."""
    device = next(model.parameters()).device
    optimizer.zero_grad()
    batch = torch.arange(8.0, device=device)[:, None].expand(8, width)
    model(batch).square().mean().backward()
    optimizer.step()


def entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """All tensors of both."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*model.state_dict().values(), *(value for value in state if isinstance(value, torch.Tensor))]
