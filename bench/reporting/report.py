"""The files that a run's JSON turns into: pages, what the documentation includes, and charts.

In: results.json of `bench.run` or growth.json of `bench.growth`, whole or of a run that was cut. Out: text
and PNG files.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from . import goals, growth_page, run_page
from .results import Data
from .run_page import readme

__all__ = ["readme", "write_all", "write_docs"]

BARS = "Bars: stall, time to durable, load and extra memory of every engine"
STEPS = "Distribution of the training step's time, and how long save() keeps the trainer"
CURVES = "Curves: seconds against bytes, tensors and ranks"


def write_all(data: Data, directory: Path) -> str:
    """The whole report and its charts in `directory`; returns the text."""
    name, whole = ("growth", growth_page.whole) if _is_growth(data) else ("report", run_page.whole)
    text = whole(data)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text, encoding="ascii")
    _draw(data, directory)
    return text


def write_docs(data: Data, directory: Path) -> None:
    """What docs/performance.md includes, and the charts that these show."""
    directory.mkdir(parents=True, exist_ok=True)
    if not _is_growth(data):
        # A workload that this run has not must not keep the chart of an earlier one.
        for name in run_page.DESCRIPTIONS:
            (directory / f"{name}.png").unlink(missing_ok=True)
    _draw(data, directory)
    included = _growth_includes(data, directory) if _is_growth(data) else _run_includes(data, directory)
    for name, text in included.items():
        (directory / f"{name}.inc").write_text(text + "\n", encoding="ascii")


def _is_growth(data: Data) -> bool:
    return data.get("kind") == "growth"


def _run_includes(data: Data, directory: Path) -> dict[str, str]:
    includes = {
        "machine": run_page.machine_line(data),
        "goals": goals.table(data),
        "notes": "\n".join(f"- {note}" for note in run_page.NOTES),
        "calls": "\n".join(f"- {call}" for call in run_page.calls(data)),
    }
    for workload in run_page.DESCRIPTIONS:
        text = "Not in this run."
        if workload in data["workloads"]:
            text = f"{run_page.title(data, workload)}.\n\n{run_page.section(data, workload)}"
        words = STEPS if workload == "trainer" else BARS
        includes[workload] = text + _picture(directory / f"{workload}.png", words)
    return includes


def _growth_includes(data: Data, directory: Path) -> dict[str, str]:
    return {
        "growth": growth_page.table(data) + _picture(directory / "growth.png", CURVES),
        "growth-points": growth_page.points_table(data),
    }


def _picture(path: Path, words: str) -> str:
    # The link starts at the page that includes this, which lies beside the directory.
    return f"\n\n![{words}]({path.parent.name}/{path.name})" if path.exists() else ""


def _draw(data: Data, directory: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no charts: matplotlib is not installed here (`python3 noxfile.py bench` has it)", file=sys.stderr
        )
        return
    from . import charts

    (charts.draw_growth if _is_growth(data) else charts.draw_run)(data, directory)
