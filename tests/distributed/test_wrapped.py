"""Distributed tensors whose local part is made of other tensors, as low-bit optimizers keep their state.

They are saved as stock saves them, and loaded bit for bit on the same and on other numbers of ranks, or
refused by name.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dcp_async import CheckpointEngine, SaveError, Trust
from dcp_async.state.wrapped import joined, pairs
from tests.support.doubles import assert_same
from tests.support.wrapped_tensors import BLOCK, COLUMNS, ROWS, Blocks, blocks, inner, job, same

TWO = (
    "save", "load", "load:replicate", "fresh", "fresh:replicate", "atomic", "stock",
    "load-block", "load-unsigned", "save-large", "save-stock", "load@stock", "atomic@stock",
)  # fmt: skip
ONE = ("load", "fresh", "atomic", "stock", "read", "load@stock")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[str]]:
    root = tmp_path_factory.mktemp("wrapped")
    two, one = job(root, 2, *TWO), job(root, 1, *ONE)
    return {(2, verb): each for verb, each in two.items()} | {(1, verb): each for verb, each in one.items()}


@pytest.mark.parametrize("verb", [verb for verb in TWO if not verb.startswith(("save", "load-"))])
def test_two_ranks_resume_bit_for_bit(said: dict[tuple[int, str], list[str]], verb: str) -> None:
    assert said[2, verb] == ["same"] * 2


@pytest.mark.parametrize("verb", [verb for verb in ONE if not verb.startswith("save")])
def test_one_rank_resumes_what_two_have_saved(said: dict[tuple[int, str], list[str]], verb: str) -> None:
    assert said[1, verb] == ["same"]


@pytest.mark.parametrize(("verb", "text"), [("load-block", "its scale is"), ("load-unsigned", "Blocks with")])
def test_other_settings_are_refused_by_name_and_nothing_is_touched(
    said: dict[tuple[int, str], list[str]], verb: str, text: str
) -> None:
    for answer in said[2, verb]:
        assert answer.startswith("IncompatibleStateError")
        assert "optim.state.0.moment" in answer
        assert text in answer
        assert answer.endswith("untouched=True")


def test_parts_that_are_no_whole_blocks_are_refused() -> None:
    value = blocks(0, ROWS, block=4 * COLUMNS)
    target = blocks(0, 2, block=2 * COLUMNS)
    with pytest.raises(ValueError, match="a Blocks can't be cut there"):
        pairs(target, ((0, 2), (0, COLUMNS)), value, ((0, 2), (0, COLUMNS)))
    with pytest.raises(ValueError, match="a Blocks can't be cut there"):
        pairs(blocks(0, 4), ((0, 4), (0, 8)), blocks(0, 4), ((0, 4), (0, 8)))


@pytest.mark.parametrize("cuts", [(0, 8), (0, 4, 8), (0, 2, 4, 6, 8), (0, 1, 2, 8)])
def test_parts_are_joined_only_where_cutting_gives_them_back(cuts: tuple[int, ...]) -> None:
    parts = [blocks(first, last - first) for first, last in pairwise(cuts)]
    assert same(joined(parts), blocks(0, ROWS))
    if len(parts) > 1:
        parts[1].table.add_(1)
        with pytest.raises(ValueError, match="can't be put together"):
            joined(parts)


async def test_in_one_process_it_is_a_leaf_that_is_filled_in_place(root: Path) -> None:
    value, target = blocks(0, 4), blocks(0, 4, zero=True)
    held = inner(target)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(
            SaveError, match=r"w: a Blocks .*Trust\(safe_globals=\(tests.support.wrapped_tensors.Blocks,\)\)"
        ):
            await engine.save({"w": value})
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Blocks,))) as engine:
        for step in range(2):
            await (await engine.save({"w": value, "t": (1, value)}, step=step)).upload_completion
        state = {"w": target, "t": None}
        await engine.load(state)
        assert state["w"] is target
        assert same(target, value)
        assert all(left is right for left, right in zip(held, inner(target), strict=True))
        assert same((await engine.read())["w"], value)
        assert_same(inner(state["t"][1]), inner(value))  # type: ignore[index]  # it was loaded
        other = blocks(0, 4, zero=True, block=BLOCK // 2)
        with pytest.raises(Exception, match="w: its scale is"):
            await engine.load({"w": other, "t": None})
        assert not torch.cat([part.flatten() for part in inner(other)[:2]]).any()
