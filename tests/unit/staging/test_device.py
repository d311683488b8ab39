"""The device path against a fake accelerator: order of queue, event and copy, pinning, what goes where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, Stager, StagingOptions
from dcp_async.staging.device import Event

DEVICE = torch.device("cuda", 3)


class FakeEvent:
    """A place in the fake queue."""

    def __init__(self, position: int) -> None:
        self.position = position


class FakeAccelerator:
    """Tensors it was told of lie on a device with one queue: work that was queued has not happened until it
    is run."""

    def __init__(self) -> None:
        self.resident: set[int] = set()
        self.queue: list[Any] = []
        self.log: list[str] = []
        self.pinned: dict[int, int] = {}

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        self.resident.add(tensor.untyped_storage().data_ptr())
        return tensor

    def launch(self, work: Any) -> None:
        """What a training step does: it returns before the device has done anything."""
        self.queue.append(work)

    def _run(self, until: int) -> None:
        while len(self.queue) > 0 and until > 0:
            self.queue.pop(0)()
            until -= 1

    def devices(self, tensors: Iterable[torch.Tensor]) -> set[torch.device]:
        return {DEVICE for tensor in tensors if not self.is_on_host(tensor)}

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() not in self.resident

    def record(self, device: torch.device) -> FakeEvent:
        self.log.append("record")
        return FakeEvent(len(self.queue))

    def copy_to_host(
        self,
        device: torch.device,
        event: Event,
        targets: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
    ) -> None:
        assert device == DEVICE
        assert isinstance(event, FakeEvent)
        self._run(event.position)
        event.position = 0
        self.log.append(f"copy {len(sources)}")
        assert not any(self.is_on_host(source) for source in sources)
        torch._foreach_copy_(list(targets), list(sources))

    def pin(self, address: int, nbytes: int) -> bool:
        self.pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        del self.pinned[address]


async def test_copies_follow_the_event_of_the_capture(root: Path) -> None:
    fake = FakeAccelerator()
    weights = fake.put(torch.zeros(100_000))
    on_host = torch.full((7,), 3.0)
    async with (
        Stager(StagingOptions(part_bytes=64 * 1024), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        fake.launch(lambda: weights.fill_(1.0))  # queued before the capture: must be in the checkpoint
        response = await engine.save({"w": weights, "h": on_host})
        fake.launch(lambda: weights.fill_(2.0))
        await response.upload_completion
        saved = await engine.read()
    assert torch.equal(saved["w"], torch.ones(100_000))
    assert torch.equal(saved["h"], on_host)
    assert fake.log[0] == "record"
    assert any(entry.startswith("copy") for entry in fake.log)


@pytest.mark.parametrize("pinned", [True, False])
async def test_pool_is_pinned_once_and_unpinned_at_the_end(root: Path, pinned: bool) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.put(torch.ones(1000))}
    async with Stager(StagingOptions(pinned=pinned), backend=fake) as stager:
        async with CheckpointEngine(root, staging=stager) as engine:
            for step in range(3):
                await (await engine.save(state, step=step)).upload_completion
        assert len(fake.pinned) == (1 if pinned else 0)
    assert fake.pinned == {}


async def test_host_tensors_record_no_event(root: Path) -> None:
    fake = FakeAccelerator()
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await (await engine.save({"w": torch.ones(5)})).upload_completion
    assert fake.log == []
