"""The device that tests of this folder run on: an accelerator, or with `--device cpu` none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where tests/gpu puts its tensors (the accelerator that torch finds)")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    if (name := request.config.getoption("--device")) is not None:
        assert isinstance(name, str)
        return torch.device(name)
    current = torch.accelerator.current_accelerator(check_available=True)
    if current is None:
        pytest.fail("torch finds no accelerator here; --device cpu runs these tests on the CPU")
    return torch.device(current.type, torch.accelerator.current_device_index())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a device's libraries warn of, each machine of something else, is shown and fails no test."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default::UserWarning"))
