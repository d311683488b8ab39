"""Small tensors whose memory is gone when the kernel is to copy it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, Stager, StateMutatedError
from tests.support.doubles import ASIDE_BYTES, KIB, FaultyStorage
from tests.support.saves import HELD

EACH = 16 * KIB


def mapped(file: Path, count: int) -> list[torch.Tensor]:
    """Tensors whose memory the kernel takes back as soon as they let go of it."""
    file.write_bytes(bytes(EACH))
    return [torch.from_file(str(file), shared=True, size=EACH, dtype=torch.uint8) for _ in range(count)]


@pytest.mark.parametrize("freed", [[-20], [-21], [-22], [-23], [-21, -22, -23]])
async def test_freed_memory_does_not_end_the_gathering_of_small_tensors(
    tmp_path: Path, faulty: FaultyStorage, freed: list[int]
) -> None:
    # the first of them are copied aside at once; every fourth is cut by the end of a part, and not gathered
    tensors = mapped(tmp_path / "mapped", ASIDE_BYTES // EACH + 100)
    async with Stager(HELD) as stager, CheckpointEngine(faulty, staging=stager) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save({"m": dict(enumerate(tensors))}, step=1)
            await gate.until_arrived()
            for at in freed:
                tensors[at].data = torch.ones(EACH, dtype=torch.uint8)
        with pytest.raises(StateMutatedError):
            await response.upload_completion
        assert stager.copier.has_vectored_copy
        await (await engine.save({"m": dict(enumerate(tensors))}, step=2)).upload_completion
        assert stager.copier.has_vectored_copy
