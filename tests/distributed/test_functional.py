"""DCP's functions over ranks: both ways with stock, several at once, and failures that all ranks share."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.functional_agent import FunctionalAgent
from tests.distributed.harness import World
from tests.distributed.planner_agent import WHOLE
from tests.support.doubles import committed


def test_two_ranks_save_and_load_as_with_stock(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with World(2, tmp_path, kind=FunctionalAgent) as world:
        both = world.all("both_ways", root=str(root))
        overlapping = world.all("overlapping", root=str(root))
        kept = world.all("kept", root=str(root), leader=1)
        failing = world.all("failing", root=str(root))
        alone = world.all("alone", root=str(root))
    for rank in range(2):
        mine = {
            "rows": WHOLE.tolist(),
            "same": {"a": [1.0] * 3, "b": [2.0] * 2},
            f"own{rank}": (rank,),
        }
        theirs, ours, names = both[rank]
        assert theirs == {**mine, "step": 4}
        assert ours == {**mine, "step": 4}
        assert names == ["own0", "own1", "rows", "same.a", "same.b", "step"]
        total, loaded = overlapping[rank]
        assert total == [32.0] * 3
        # of the two of one directory the later one stays
        assert loaded == [{**mine, "step": step} for step in (0, 2, 3)]
        assert kept[rank] == {**mine, "step": 2}
    assert failing[0] == failing[1]
    assert len(failing[0]) == 3
    assert all("rank 1" in end and "no state" in end for end in failing[0][:2])
    assert "absent" in failing[0][2]
    assert alone == [0, 0]
    assert committed(root) == ["alone0", "alone1", "kept", "one", "ours", "same", "stock", "two"]
