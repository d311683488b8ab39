"""Runs the command line in this process, and makes checkpoints for it to look at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async.cli import main
from dcp_async.sync import CheckpointEngine


@dataclass(frozen=True)
class Ran:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> Ran:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ran(int(status), captured.out, captured.err)

    return run


def make_state(shift: float = 0.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model": {"w": torch.randn(300, 100, generator=generator) + shift, "b": torch.zeros(3)},
        "many": [torch.full((3,), float(number)) for number in range(5)],
        "half": torch.ones(4, dtype=torch.bfloat16),
        "epoch": 3,
    }


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A root with three checkpoints of ours, the second of which moved nothing, and one of stock's."""
    root = tmp_path / "runs"
    with CheckpointEngine(root) as engine:
        for step, shift in ((1, 0.0), (2, 0.0), (3, 0.5)):
            state = make_state(shift)
            engine.save(state, step=step, notes={"loss": 1 / step, "tag": "a b"}).upload_completion.result()
    dcp.save(make_state(), checkpoint_id=root / "stock-7", no_dist=True)
    return root


def step(number: int) -> str:
    return f"step-{number:08d}"


def names(entries: Sequence[dict[str, Any]]) -> list[str]:
    return [entry["name"] for entry in entries]
