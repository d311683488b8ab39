"""Saves beside a graph capture, and inside of one; each in a process of its own, which it may poison."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CAPTURES = Path(__file__).with_name("captures.py")


@pytest.mark.parametrize("case", ["beside", "inside"])
def test_a_graph_capture_is_not_disturbed_by_a_save(tmp_path: Path, device: torch.device, case: str) -> None:
    if device.type != "cuda":
        pytest.skip("captures CUDA graphs")
    command = [sys.executable, str(CAPTURES), str(tmp_path), case]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=CAPTURES.parents[2])
    assert ran.returncode == 0, ran.stderr[-4000:]
