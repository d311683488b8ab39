"""RNGState with an accelerator: which devices' generators are saved, and which take what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, RNGState
from tests.support.saves import Value, saved


class Devices:
    """A device module and ``torch.accelerator``, of which one generator per device is left."""

    def __init__(self, count: int, current: int = 0, *, is_initialized: bool = True) -> None:
        self.count, self.current, self._is_initialized = count, current, is_initialized
        self.generators = [10 * index for index in range(count)]

    def is_initialized(self) -> bool:
        return self._is_initialized

    def get_rng_state(self, device: int | None = None) -> torch.Tensor:
        assert self._is_initialized, "asking initialises the device"
        return torch.tensor([self.generators[self.current if device is None else device]])

    def set_rng_state(self, state: torch.Tensor, device: int | None = None) -> None:
        assert state.is_cpu
        self.generators[self.current if device is None else device] = int(state)


class OneDevice:
    """As ``torch.mps`` is: its functions take no device, and nobody asks whether it is initialised."""

    def __init__(self) -> None:
        self.count, self.generator = 1, 7

    def get_rng_state(self) -> torch.Tensor:
        return torch.tensor([self.generator])

    def set_rng_state(self, state: torch.Tensor) -> None:
        self.generator = int(state)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(devices: Devices | OneDevice) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: devices.count)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: getattr(devices, "current", 0))
        monkeypatch.setattr(torch, "get_device_module", lambda: devices)

    return use


async def test_the_generators_of_all_devices_come_back(root: Path, use: Any) -> None:
    use(devices := Devices(3, current=1))
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        devices.generators = [1, 2, 3]
        await engine.load({"rng": RNGState()})
    assert devices.generators == [0, 10, 20]


async def test_no_device_is_initialised_for_its_generator(root: Path, use: Any) -> None:
    use(Devices(2, is_initialized=False))
    assert not any(name.startswith("accelerator") for name in RNGState().state_dict()["rank_0"])
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        await engine.load({"rng": RNGState()})


async def test_a_device_that_is_not_initialised_yet_takes_its_own(root: Path, use: Any) -> None:
    use(Devices(1))
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        use(devices := Devices(1, is_initialized=False))
        devices.generators = [5]
        await engine.load({"rng": RNGState()})
    assert devices.generators == [0]


@pytest.mark.parametrize("count", [1, 3])
async def test_a_checkpoint_of_one_generator_is_the_current_devices(
    root: Path, use: Any, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As earlier releases saved it, whatever the number of devices was."""
    use(devices := Devices(count, current=count - 1))
    earlier = RNGState().state_dict()
    earlier["rank_0"].pop("accelerators", None)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": Value(earlier)})
        devices.generators = [1, 2, 3][:count]
        await engine.load({"rng": RNGState()})
    assert devices.generators == [1, 2, 20][:count] if count > 1 else devices.generators == [0]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_one_device_is_saved_as_earlier_releases_do(use: Any) -> None:
    use(Devices(1))
    state = RNGState().state_dict()["rank_0"]
    assert "accelerators" not in state
    assert torch.equal(state["accelerator"], torch.tensor([0]))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Devices(4, current=3), Devices(2, current=1), [0, 30]),
        (Devices(8, current=3), Devices(1), [30]),
        (Devices(2, current=1), Devices(4, current=1), [0, 10, 3, 4]),
        (Devices(4, current=3), Devices(4, current=2), [0, 10, 30, 30]),
        (Devices(1), Devices(3, current=2), [1, 2, 0]),
    ],
    ids=["fewer devices", "one device", "more devices", "another current device", "one before"],
)
async def test_other_devices_take_what_was_saved_for_them(
    root: Path,
    use: Any,
    before: Devices,
    after: Devices,
    expected: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    use(before)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        use(after)
        after.generators = [1, 2, 3, 4][: after.count]
        await engine.load({"rng": RNGState()})
    assert after.generators == expected
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (1 if 1 < before.count < after.count else 0), warned


async def test_a_module_of_one_device_is_asked_without_a_number(root: Path, use: Any) -> None:
    use(device := OneDevice())
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        device.generator = 1
        await engine.load({"rng": RNGState()})
    assert device.generator == 7
