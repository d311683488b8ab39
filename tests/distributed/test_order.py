"""Statefuls whose verbs run collectives are asked and filled in one order on all ranks, whatever the order of
each rank's mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dcp_async.sync import CheckpointEngine
from tests.distributed.harness import World
from tests.distributed.replica_agent import Chatty, caching_states, chatty_states

LAYOUTS = list(chatty_states(0, []))


def assert_all(outcomes: list[dict[str, Any]], kind: str) -> None:
    assert [each["kind"] for each in outcomes] == [kind] * len(outcomes), outcomes


def common(asked: list[list[str]]) -> list[list[str]]:
    return [[word for word in mine if not word.endswith("alone")] for mine in asked]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_verb_meets_itself_on_the_other_rank(pair: World, root: Path, layout: str) -> None:
    assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    pair.all("hold_chatty", layout=layout)
    for step in range(1, 4):  # a walk, and repeats of it
        assert_all(pair.all("save", step=step), "committed")
        first, second = common(pair.all("asked"))
        assert first == second
        assert len(first) == len(set(first))
    assert_all(pair.all("load"), "loaded")
    first, second = common(pair.all("asked"))
    assert first == second
    assert any(word.startswith("load ") for word in first)
    pair.all("finish_engine")


@pytest.mark.parametrize("layout", list(caching_states(0, [])))
def test_all_ranks_ask_whom_one_needs_to_ask(pair: World, root: Path, layout: str) -> None:
    assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    pair.all("hold_caching", layout=layout)
    assert_all(pair.all("save", step=1), "committed")
    pair.all("hold_caching", layout=layout)  # fresh ones
    assert_all(pair.all("load"), "loaded")
    first, second = pair.all("asked")
    assert first == second
    assert len(first) == len(set(first))
    pair.all("finish_engine")


def test_a_process_alone_keeps_the_mappings_order(root: Path) -> None:
    asked: list[str] = []
    state: dict[str, Any] = {
        "z": Chatty("z", asked, {"y": Chatty("y", asked, alone=True)}, alone=True),
        "a": [Chatty("b", asked, alone=True), {"c": Chatty("c", asked, alone=True)}],
    }
    with CheckpointEngine(root) as engine:
        for step in range(2):
            engine.save(state, step=step)
            assert asked == ["ask z", "ask y", "ask b", "ask c"]
            asked.clear()
        engine.wait()
        engine.load(state)
        given = [word for word in asked if word.startswith("load ")]
        assert given == ["load y", "load z", "load b", "load c"]
        assert list(engine.read(1)) == ["z", "a"]


def test_a_checkpoint_of_several_keeps_the_order_of_the_first_ranks_mapping(pair: World, root: Path) -> None:
    assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    pair.all("hold_chatty", layout="at the top")
    assert_all(pair.all("save", step=1), "committed")
    with CheckpointEngine(root) as engine:
        assert list(engine.read(1)) == ["b", "a", "c"]
    pair.all("finish_engine")
