"""What a run measures, in which order and side by side with whom."""

from __future__ import annotations

from bench import engines, run


def test_groups_have_ours_in_each_and_keep_to_the_memory() -> None:
    state_bytes = 2 << 30
    others = [engine for engine in engines.OTHERS if engine != engines.RAW]
    made = engines.groups_that_fit(others, state_bytes, 18 << 30)
    assert [engine for group in made for engine in group if engine != engines.OURS] == others
    assert all(group[0] == engines.OURS for group in made)
    assert all(engines.memory_needed(group, state_bytes) <= 18 << 30 for group in made)


def test_comparisons_put_the_core_of_every_workload_first() -> None:
    planned = run.comparisons(run.parse(["--workloads", "many,trainer,large"]), 64 << 30)
    assert [comparison.workload for comparison in planned if comparison.core] == ["many", "trainer", "large"]
    assert all(comparison.core for comparison in planned[:3])
    assert {engine for comparison in planned for engine in comparison.engines} == set(engines.ENGINES)
