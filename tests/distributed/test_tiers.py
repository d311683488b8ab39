"""Two ranks on two tiers: the coordinator replicates for both, and a new near tier is read from far."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.buckets.agent import rows_of
from tests.distributed import tier_agent
from tests.support.processes import run_in_processes


def test_the_coordinator_replicates_the_files_of_all_ranks(tmp_path: Path) -> None:
    first, second = run_in_processes(
        [(tier_agent.save, (tmp_path / "store1", rank, 2, tmp_path)) for rank in range(2)]
    )
    assert first == "step-00000002"
    assert "the coordinator replicates" in second
    near, far = tmp_path / "near", tmp_path / "far"
    files = {path.relative_to(near): path.read_bytes() for path in near.rglob("*") if path.is_file()}
    assert files == {path.relative_to(far): path.read_bytes() for path in far.rglob("*") if path.is_file()}
    shutil.rmtree(near)
    firsts = run_in_processes(
        [(tier_agent.load, (tmp_path / "store2", rank, 2, tmp_path)) for rank in range(2)]
    )
    assert firsts[0] + firsts[1] == rows_of(2)[:, 0].tolist()
