"""Steps that earlier releases took and this one refuses to save are read, and are in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from dcp_async import CheckpointEngine
from tests.support.doubles import manifest_file


def sign(manifest: Path, old: str, new: str) -> None:
    """Put ``new`` in place of ``old``, as the release that wrote it would have."""
    body = manifest.read_text()[:-29]
    assert old in body
    changed = body.replace(old, new).encode()
    manifest.write_bytes(changed + b',"digest":"%s"}' % xxhash.xxh3_64_hexdigest(changed).encode())


@pytest.mark.parametrize("step", [1 << 63, 1 << 70, 10**30])
async def test_a_step_beyond_64_bits_is_the_newest(root: Path, step: int) -> None:
    state: dict[str, Any] = {"w": torch.ones(3), "n": 7}
    async with CheckpointEngine(root) as engine:
        await engine.save(state, step=7)
        await engine.save({**state, "n": 8}, step=8)
    name = f"step-{step}"
    (root / "step-00000007").rename(root / name)
    sign(manifest_file(root / name), '"step":7', f'"step":{step}')
    async with CheckpointEngine(root) as engine:
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == step
        assert [info.step async for info in engine.checkpoints()] == [8, step]
        target = {"w": torch.zeros(3), "n": 0}
        report = await engine.load(target)
        assert (report.step, report.skipped, target["n"]) == (step, (), 7)
        with pytest.raises(ValueError, match="less than"):
            await engine.save(state, step=step)
        await (await engine.save(state, step=9)).upload_completion
