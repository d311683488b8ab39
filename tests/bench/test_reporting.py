"""What a report makes of samples: medians, ratios inside a group, tables, lines; from the JSON of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import measuring, reporting
from bench.reporting import curves, goals, growth_page, results, run_page

MACHINE = {
    "cores": 2,
    "cpu": "a processor",
    "memory_bytes": 24 << 30,
    "kernel": "6.1",
    "python": "3.11.0",
    "file_system": "ext4",
    "load_average_at_start": 0.1,
    "started": "2026-01-01T00:00:00Z",
}
CONFIGURATION = {"runs": 3, "scale": 1.0, "quick": False, "minutes": 1.0}


def make_group(**samples: dict[str, list[float]]) -> measuring.Group:
    """A group that gave these samples; `_` in an engine's name stands for a space."""
    named = {engine.replace("__", " "): figures for engine, figures in samples.items()}
    fact = {"call": "call()", "nbytes": 1 << 30, "num_tensors": 64, "torch": "2.13.0", "threads": 2}
    return measuring.Group([], facts=dict.fromkeys(named, fact), samples=named)


@pytest.fixture
def data() -> results.Data:
    made = results.new(CONFIGURATION, MACHINE)
    core = make_group(
        raw={"copy": [0.05, 0.06, 0.07], "write": [0.5], "cold": [0.8], "cold_direct": [0.4]},
        dcp_async={"staged": [0.1, 0.2, 0.9], "durable": [0.5, 0.6, 0.7], "cold": [0.5], "lost_tiny": [0.01]},
        stock={"staged": [0.4, 0.4, 0.4], "durable": [3.0], "cold": [1.0], "lost_tiny": [0.5]},
    )
    results.add(made, "large", core)
    others = make_group(
        dcp_async={"staged": [0.4], "durable": [1.0]}, torchsnapshot={"staged": [0.8], "durable": [1.5]}
    )
    others.failures["stock process"] = "OSError: too many open files"
    results.add(made, "large", others)
    return made


def test_cell_compares_inside_the_group_of_the_engine(data: results.Data) -> None:
    stock = results.cell(data, "large", "stock", "staged")
    peer = results.cell(data, "large", "torchsnapshot", "staged")
    assert stock is not None
    assert peer is not None
    assert stock.ratio == pytest.approx(2.0)
    assert peer.ratio == pytest.approx(2.0)
    assert stock.num_samples == 3


def test_cell_of_raw_is_the_faster_floor(data: results.Data) -> None:
    cold = results.cell(data, "large", "raw", "cold")
    assert cold is not None
    assert cold.value == 0.4


def test_cell_is_none_where_nothing_was_taken(data: results.Data) -> None:
    assert results.cell(data, "large", "stock", "warm") is None
    assert results.cell(data, "many", "stock", "cold") is None


def test_table_shows_every_engine_its_mark_and_its_failure(data: results.Data) -> None:
    text = run_page.section(data, "large")
    assert r"| torchsnapshot \* | 800 ms (2x) |" in text
    assert "| **dcp_async** | 200 ms |" in text
    assert "Failed: stock process: `OSError: too many open files`" in text
    assert "| raw limits | 60 ms" in text


def test_readme_table_has_ours_and_how_many_times_ours_the_others_take(data: results.Data) -> None:
    text = reporting.readme(data)
    assert "| `large`: durable |" in text, text
    assert "dcp_async overlap" not in text, "our own variants are no peers"


def test_goals_name_what_was_reached_and_what_was_not(data: results.Data) -> None:
    text = goals.table(data)
    assert "| large | stall / one copy into warm memory | <= 1.5 | 3.33 | **no** |" in text
    assert "| large | load, cold: stock / ours | >= 1.5 | 2.00 | yes |" in text
    assert "| large | lost per save, tiny-op loop: stock / ours | >= 20 | 50 | yes |" in text


def test_a_loss_of_nothing_meets_its_goal(data: results.Data) -> None:
    data["workloads"]["large"]["groups"][0]["samples"]["dcp_async"]["lost_tiny"] = [-0.01]
    assert "| >= 20 | ours: none measurable | yes |" in goals.table(data)


def test_trainer_table_has_percentiles_and_the_median_loss() -> None:
    made = results.new(CONFIGURATION, MACHINE)
    group = make_group(
        dcp_async={
            "plain_steps": [[0.1] * 99 + [0.2]],  # type: ignore[list-item]  # lists, as the trainer gives
            "steps": [[0.1] * 98 + [0.3] * 2],  # type: ignore[list-item]  # lists, as the trainer gives
            "save_calls": [[0.05]],  # type: ignore[list-item]  # lists, as the trainer gives
            "plain_seconds_a_step": [0.1, 0.1, 0.1],
            "saving_seconds_a_step": [0.125, 0.1, 0.2],
        }
    )
    results.add(made, "trainer", group)
    assert (
        "| **dcp_async** | 100 ms | 100 ms | 100 ms | 300 ms | 3.00 | 50 ms | 20.0 % |"
        in run_page.section(made, "trainer")
    )


def test_results_come_back_as_written(data: results.Data, tmp_path: Path) -> None:
    path = tmp_path / "below" / "results.json"
    results.write(data, path)
    assert results.read(path) == data
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_documentation_gets_a_file_for_every_workload(data: results.Data, tmp_path: Path) -> None:
    reporting.write_docs(data, tmp_path)
    names = {path.stem for path in tmp_path.glob("*.inc")}
    assert set(run_page.DESCRIPTIONS) <= names
    assert "Not in this run." in (tmp_path / "many.inc").read_text()


def test_line_finds_the_slope_of_points_on_one() -> None:
    points = [{"sweep": "bytes", "num_ranks": 1, "num_tensors": 64, "nbytes": gb * 10**9} for gb in (1, 2, 4)]
    samples: list[dict[str, Any]] = [{"dcp_async": {"durable": [0.1 + gb / 2] * 3}} for gb in (1, 2, 4)]
    data = {
        "points": [
            {**point, "samples": taken, "failures": {}} for point, taken in zip(points, samples, strict=True)
        ],
        "engines": {"dcp_async": "call()"},
    }
    (fit,) = curves.fits(data)
    assert fit["slope"] == pytest.approx(0.5e-9)
    assert fit["intercept"] == pytest.approx(0.1)
    assert fit["r_squared"] == pytest.approx(1.0)
    assert "500 ms/GB" in growth_page.table(data)
    assert json.dumps(fit)
