"""Plain tensors that carry torch's CheckpointableTensor protocol, over real ranks: saved as parts of what
they say, loaded into any other layout, with stock on either side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.layouts import CHECKPOINTABLE_LAYOUTS, world_of
from tests.distributed.matrix_worker import Teams
from tests.distributed.test_matrix import loads, run_all

pytest.importorskip(
    "torch.distributed.checkpoint.protocol", reason="new in torch 2.14.1", exc_type=ImportError
)

FAMILY = "tensors"
ELSEWHERE = (*CHECKPOINTABLE_LAYOUTS, "plain-1", "shard1-2", "hooks-3")


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teams]:
    with Teams(tmp_path_factory.mktemp("teams")) as made:
        yield made


@pytest.mark.timeout(300)
@pytest.mark.parametrize("saved", CHECKPOINTABLE_LAYOUTS)
def test_what_we_saved_loads_in_every_layout_and_by_stock(saved: str, teams: Teams, root: Path) -> None:
    world = world_of(FAMILY, saved)
    teams.of(world).do("save", family=FAMILY, layout=saved, root=str(root))
    from_tests = [name for name in ELSEWHERE if world_of(FAMILY, name) != world]
    run_all(
        [
            ("read", lambda: teams.of(1).do("read", family=FAMILY, root=str(root))),
            *loads(teams, FAMILY, "load", ELSEWHERE, root=str(root), saved_world=world),
            *loads(teams, FAMILY, "stock_load", from_tests, root=str(root)),
        ]
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("saved", CHECKPOINTABLE_LAYOUTS)
def test_what_stock_saved_loads_in_every_layout(saved: str, teams: Teams, root: Path) -> None:
    teams.of(world_of(FAMILY, saved)).do("stock_save", family=FAMILY, layout=saved, root=str(root))
    run_all(loads(teams, FAMILY, "load", ELSEWHERE, root=str(root), saved_world=None))


@pytest.mark.timeout(300)
def test_another_layout_loads_into_parts(teams: Teams, root: Path) -> None:
    teams.of(2).do("save", family=FAMILY, layout="shard1-2", root=str(root))
    run_all(loads(teams, FAMILY, "load", tuple(CHECKPOINTABLE_LAYOUTS), root=str(root), saved_world=2))
