"""The contract of ``Backend`` on a real device."""

from __future__ import annotations

import pytest
import torch

from tests.support.backend_contract import BackendContract, Rig, TorchRig


class TestTorch(BackendContract):
    @pytest.fixture
    def rig(self, device: torch.device) -> Rig:
        return TorchRig(device)
