"""What most suites save, and how: a small state, stagers of small parts, and a save that is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dcp_async import CheckpointEngine, CheckpointInfo, StagingOptions
from tests.support.doubles import ASIDE_BYTES, KIB, FaultyStorage, random_tensor

PART = 64 * KIB
SMALL = StagingOptions(part_bytes=PART, budget_bytes=4 * PART)
SMALL_OVERLAP = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 4 * PART, overlap=True)
HELD = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 8 * PART, overlap=True)
"""Less than a state of some MiB: staging waits for whoever holds the storage's writes."""

STATE = {"w": random_tensor(torch.float32, (100, 100), 1), "n": 1}


async def saved(engine: CheckpointEngine, state: Mapping[str, Any], **options: Any) -> CheckpointInfo:
    """Save ``state`` and wait until it is committed."""
    return await (await engine.save(state, **options)).upload_completion


async def step_while_staging(
    engine: CheckpointEngine, faulty: FaultyStorage, state: Mapping[str, Any], optim: torch.optim.Optimizer
) -> None:
    """Save ``state``, which ``engine``'s storage takes so slowly that ``optim`` steps before it is staged."""
    with faulty.hold("put") as gate:
        # Registered before the engine's own hook, so it runs first: no staging until step() was entered.
        optim.register_step_pre_hook(lambda *_: gate.release())
        response = await engine.save(state)
        assert not response.staging_completion.done()
        optim.step()
    await response.upload_completion


class Value:
    """A Stateful whose state is whatever it was given."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value
