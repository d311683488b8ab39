"""Leaves that are equal on all ranks are saved, however each rank pickles them; those that are not are
refused, with the place that differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import World
from tests.distributed.replica_agent import leaves


@pytest.mark.parametrize("kind", leaves(0, ""))
def test_equal_leaves_are_saved_and_unequal_ones_are_refused_by_place(
    pair: World, root: Path, kind: str
) -> None:
    assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    for step in range(1, 4):
        pair.all("hold_leaf", kind=kind)
        before = pair.all("messages")
        outcomes = pair.all("save", step=step)
        assert [each["kind"] for each in outcomes] == ["committed"] * 2, outcomes
        after = pair.all("messages")
    # once it is known to be pickled otherwise, it costs no message more
    assert [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, after, strict=True)] == [(2, 2), (2, 2)]
    for step in (7, 8):  # in the steady state, and in the first save of an engine
        pair[0].do("hold_leaf", kind=kind)
        pair[1].do("hold_leaf", kind=kind, odd="odd")
        for outcome in pair.all("save", step=step):
            assert outcome["kind"] == "SaveError", outcome
            assert "leaf differs between rank 0 and rank 1" in outcome["text"]
            assert "PerRank" in outcome["text"]
            assert outcome["phase"] == "plan"
            if kind not in ("an array",):
                assert "odd" in outcome["text"], outcome
        pair.all("finish_engine")
        assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    pair.all("hold_leaf", kind=kind)
    assert {each["kind"] for each in pair.all("save", step=9)} == {"committed"}
    assert {each["kind"] for each in pair.all("load", source=9)} == {"loaded"}
    pair.all("finish_engine")


def test_a_leaf_of_which_nothing_can_be_told_says_so(pair: World, root: Path) -> None:
    assert pair.all("replica_engine", root=str(root)) == [{"kind": "open"}] * 2
    pair.all("hold_opaque")
    for outcome in pair.all("save", step=1):
        assert outcome["kind"] == "SaveError", outcome
        for text in ("leaf differs between rank 0 and rank 1", "can't be told", "PerRank", "__reduce__"):
            assert text in outcome["text"], outcome
    pair.all("finish_engine")
