"""The files that a run's JSON turns into: pages, what the documentation includes, and charts.

In: results.json of `bench.run`, growth.json of `bench.growth` or gpu.json of `bench.gpu`, whole or of a run
that was cut. Out: text and PNG files; figures of devices have no charts.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from . import device_page, goals, growth_page, run_page
from .results import Data
from .run_page import readme

__all__ = ["readme", "write_all", "write_docs"]

BARS = "Bars: stall, time to durable, load and extra memory of every engine"
STEPS = "Distribution of the training step's time, and how long save() keeps the trainer"
CURVES = "Curves: seconds against bytes, tensors and ranks"
PAGES: Mapping[str, tuple[str, Callable[[Data], str]]] = {
    "run": ("report", run_page.whole),
    "growth": ("growth", growth_page.whole),
    "gpu": ("gpu", device_page.whole),
}
"""By kind of run: the page's name, and what makes it."""


def write_all(data: Data, directory: Path) -> str:
    """The whole report and its charts in `directory`; returns the text."""
    name, whole = PAGES[_kind(data)]
    text = whole(data)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text, encoding="ascii")
    _draw(data, directory)
    return text


def write_docs(data: Data, directory: Path) -> None:
    """What docs/performance.md includes, and the charts that these show."""
    directory.mkdir(parents=True, exist_ok=True)
    if _kind(data) == "run":
        # A workload that this run has not must not keep the chart of an earlier one.
        for name in run_page.DESCRIPTIONS:
            (directory / f"{name}.png").unlink(missing_ok=True)
    _draw(data, directory)
    includes = {"run": _run_includes, "growth": _growth_includes, "gpu": _device_includes}
    for name, text in includes[_kind(data)](data, directory).items():
        (directory / f"{name}.inc").write_text(text + "\n", encoding="ascii")


def _kind(data: Data) -> str:
    kind: str = data.get("kind", "run")
    return kind


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


def _device_includes(data: Data, directory: Path) -> dict[str, str]:
    return {"gpu": device_page.included(data)}


def _picture(path: Path, words: str) -> str:
    # The link starts at the page that includes this, which lies beside the directory.
    return f"\n\n![{words}]({path.parent.name}/{path.name})" if path.exists() else ""


def _draw(data: Data, directory: Path) -> None:
    if _kind(data) == "gpu":
        return
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no charts: matplotlib is not installed here (`python3 noxfile.py bench` has it)", file=sys.stderr
        )
        return
    from . import charts

    (charts.draw_growth if _kind(data) == "growth" else charts.draw_run)(data, directory)
