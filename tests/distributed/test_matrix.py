"""Every layout saved, loaded in every other one, bit for bit; stock DCP on either side."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import FAMILIES, world_of
from tests.distributed.matrix_worker import NAME, CaseError, Team, Teams
from tests.support.doubles import MIB, data_files

NOT_FOR_STOCK = {("tensors", "sharded_tensor-2")}
"""Stock's load planner leaves out a ShardedTensor that has no shard on the rank; if the checkpoint has a name
that the state lacks, it then takes it for one of torch 2.3 and misses names that are there."""


@dataclass(frozen=True)
class Row:
    """A family of states, the layout that it is saved in, and those that it is loaded in."""

    family: str
    saved: str
    loaded: tuple[str, ...]

    @property
    def world(self) -> int:
        return world_of(self.family, self.saved)

    def elsewhere(self) -> list[str]:
        """Of the loaded layouts, those of another number of ranks that stock can load into."""
        loadable = [layout for layout in self.loaded if (self.family, layout) not in NOT_FOR_STOCK]
        return [layout for layout in loadable if world_of(self.family, layout) != self.world]

    def __str__(self) -> str:
        return f"{self.family}-{self.saved}"


FULL = [Row(family, saved, layouts) for family, layouts in FAMILIES.items() for saved in layouts]


def sample(seed: int) -> list[Row]:
    """A row of each family, with three layouts each; the seed that is used has most kinds of layout."""
    generator = random.Random(seed)
    return [
        Row(family, generator.choice(layouts), tuple(generator.sample(layouts, 3)))
        for family, layouts in FAMILIES.items()
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = FULL if metafunc.config.getoption("--matrix") == "full" else sample(5096)
        if metafunc.function is test_stock_reads_what_we_saved_at_another_world_size:
            # stock fills what is there, and an optimizer without a step has nothing
            rows = [row for row in rows if row.family != "bare_resume"]
        metafunc.parametrize("row", rows, ids=str)


@pytest.fixture(scope="module")
def teams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teams]:
    with Teams(tmp_path_factory.mktemp("teams")) as made:
        yield made


def run_all(cases: Sequence[tuple[str, Callable[[], list[list[str]]]]]) -> None:
    """Also after a failure, for the next may be as telling as the first."""
    wrong = []
    for name, case in cases:
        try:
            differences = case()
        except CaseError as error:
            wrong.append(f"{name}: {error}")
        else:
            texts = [f"rank {rank}: {text}" for rank, found in enumerate(differences) for text in found]
            wrong += [f"{name}, {text}" for text in texts]
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def loads(teams: Teams, family: str, verb: str, layouts: Sequence[str], **arguments: Any) -> list[Any]:
    """A case for each layout, to be run in a team of its size."""

    def case(layout: str) -> Callable[[], list[list[str]]]:
        size = world_of(family, layout)
        return lambda: teams.of(size).do(verb, family=family, layout=layout, **arguments)

    return [(f"{verb} in {layout}", case(layout)) for layout in layouts]


@pytest.mark.timeout(300)
def test_saved_layout_loads_in_every_other_one(row: Row, teams: Teams, root: Path) -> None:
    teams.of(row.world).do("save", family=row.family, layout=row.saved, root=str(root))
    cases = loads(teams, row.family, "load", row.loaded, root=str(root), saved_world=row.world)
    cases.append(("read", lambda: teams.of(1).do("read", family=row.family, root=str(root))))
    run_all(cases)


@pytest.mark.timeout(300)
def test_stock_reads_what_we_saved_at_another_world_size(row: Row, teams: Teams, root: Path) -> None:
    teams.of(row.world).do("save", family=row.family, layout=row.saved, root=str(root))
    run_all(loads(teams, row.family, "stock_load", row.elsewhere(), root=str(root)))


@pytest.mark.timeout(300)
def test_what_stock_saved_loads_in_every_layout(row: Row, teams: Teams, root: Path) -> None:
    teams.of(row.world).do("stock_save", family=row.family, layout=row.saved, root=str(root))
    cases = loads(teams, row.family, "load", row.loaded, root=str(root), saved_world=None)
    cases.append(("read", lambda: teams.of(1).do("read", family=row.family, root=str(root))))
    run_all(cases)


def refusals(team: Team, verb: str, root: Path) -> list[str]:
    """What every rank was told, and nothing was published."""
    told: list[str] = team.do(verb, root=str(root))
    assert not (root / NAME / ".metadata").exists()
    return told


def test_partial_placement_is_refused_by_name(teams: Teams, root: Path) -> None:
    for text in refusals(teams.of(2), "refuse_partial", root):
        assert "model.summand" in text
        assert "Partial" in text
        assert "redistribute()" in text


def test_one_name_with_two_sizes_is_refused_by_name(teams: Teams, root: Path) -> None:
    for text in refusals(teams.of(2), "refuse_sizes", root):
        assert "model.odd is (3,) float32 on rank 0, but (4,) float32 on rank 1" in text


def test_name_that_no_rank_expects_is_refused_and_those_of_other_ranks_are_not(
    teams: Teams, root: Path
) -> None:
    for text, target in teams.of(2).do("refuse_load", root=str(root)):
        assert "not in the state: model.c)" in text
        assert target == [0.0, 0.0]


def test_replicated_tensors_are_written_once_and_spread_by_bytes(teams: Teams, root: Path) -> None:
    nbytes = teams.of(4).do("save_replicated", root=str(root), count=200)[0]
    sizes = [path.stat().st_size for path in data_files(root / NAME)]
    assert len(sizes) == 4
    assert nbytes < sum(sizes) < 1.1 * nbytes
    assert max(sizes) <= 1.25 * min(sizes)


def test_rank_reads_little_more_than_the_rows_that_it_needs(teams: Teams, root: Path) -> None:
    rows, columns = 8192, 2048
    teams.of(1).do("save_long", root=str(root), rows=rows, columns=columns)
    eighth = 4 * rows * columns // 8
    assert eighth == 8 * MIB
    for nbytes, is_right in teams.of(8).do("load_long", root=str(root), rows=rows, columns=columns):
        assert is_right
        assert nbytes <= 1.1 * eighth
