"""Simulated ranks equal real ones, and every step of planning runs over them, in every layout."""

from __future__ import annotations

import pytest

from bench.measuring.planning import LAYOUTS, Ranks, run_ours, run_stock


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_of_both_planners_run_on_simulated_ranks(layout: str) -> None:
    ranks = Ranks.build(layout, items=40, world_size=3)  # which compares the last rank with a real one
    first, later, nbytes = run_ours(ranks)
    stock, stock_nbytes = run_stock(ranks)
    assert {"rank: plan", "global plan", "commit: render"} <= first.keys()
    assert "verdict" in later
    assert {"rank: dumps", "loads", "global plan"} <= stock.keys()
    assert nbytes["offers"]
    assert stock_nbytes["plans"]
