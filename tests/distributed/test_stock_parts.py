"""Parts of stock's over ranks: the coordinator plans and finishes, and all ranks fail alike."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.harness import World
from tests.distributed.planner_agent import WHOLE
from tests.distributed.stock_parts_agent import StockPartsAgent

FAULTS = (
    ("set_up_storage_writer", 1),
    ("prepare_global_plan", 0),
    ("write_data", 0),
    ("write_data", 1),
    ("finish", 0),
)


def test_two_ranks_save_and_load_through_parts_of_ones_own(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    with World(2, tmp_path, kind=StockPartsAgent) as world:
        through = world.all("through", root=root)
        failed = {fault: world.all("failing", root=root, method=fault[0], rank=fault[1]) for fault in FAULTS}
        loads = [world.all("failing_load", root=root, rank=rank) for rank in (0, 1)]
        again = world.all("through", root=f"{root}2")
    for rank, (calls, loaded, num_names) in [*enumerate(through), *enumerate(again)]:
        leads = rank == 0
        assert calls == [
            "set_up_storage_writer",
            *(["prepare_global_plan"] if leads else []),
            "write_data",
            *(["finish"] if leads else []),
        ]
        assert loaded == {
            "rows": WHOLE.tolist(),
            "same": {"a": [1.0] * 3, "b": [2.0] * 2},
            "step": 4,
            f"own{rank}": (rank,),
        }
        assert num_names == 6
    for (method, rank), (first, second) in failed.items():
        assert first == second
        assert first.startswith("SaveError: ")
        assert f"rank {rank}" in first
        assert f"{method} is torn" in first
        assert not (tmp_path / "run" / f"{method}-{rank}" / ".metadata").exists()
    for rank, (first, second) in enumerate(loads):
        assert first == second
        assert first.startswith("LoadError: ")
        assert f"rank {rank}" in first
        assert "partly overwritten" in first
