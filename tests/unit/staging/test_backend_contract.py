"""The contract of ``Backend`` on the fake, in each of its orders, and on the CPU, which gives no streams."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.support.accelerator import FakeAccelerator, Order
from tests.support.backend_contract import BackendContract, FakeRig, Rig, TorchRig


class TestFake(BackendContract):
    @pytest.fixture(params=[*get_args(Order), 0, 1, 2])
    def rig(self, request: pytest.FixtureRequest) -> Rig:
        if isinstance(request.param, int):
            return FakeRig(FakeAccelerator(2, seed=request.param))
        return FakeRig(FakeAccelerator(2, order=request.param))


class TestCpu(BackendContract):
    @pytest.fixture
    def rig(self) -> Rig:
        return TorchRig(torch.device("cpu"))
