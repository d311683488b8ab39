"""What a planning run leaves: samples by case, as JSON and as a table of medians and ratios.

In: the samples of each layout and number of ranks. Out: two texts.
Keeps: a ratio compares one run only.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from . import markdown

Times = Mapping[str, float]
"""Seconds by step."""

Phase = Literal["rank", "plan", "commit"]
PHASES: tuple[Phase, ...] = ("rank", "plan", "commit")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What all samples of one layout and number of ranks gave."""

    layout: str
    world_size: int
    samples: Mapping[str, Sequence[Times]]
    """By "first", "later" and "stock"."""
    nbytes: Mapping[str, int]
    stock_nbytes: Mapping[str, int]

    def median(self, which: str) -> Times:
        """The median of each step."""
        taken = self.samples[which]
        steps = taken[0] if taken else {}
        return {step: statistics.median(sample[step] for sample in taken) for step in steps}

    def seconds(self, which: str, phase: Phase) -> float | None:
        """The median of what all steps of a phase took: of one rank, or of the coordinator."""
        sums = [
            sum(seconds for step, seconds in sample.items() if phase_of(step) == phase)
            for sample in self.samples[which]
        ]
        return float(statistics.median(sums)) if sums else None


def phase_of(step: str) -> str:
    """Steps are named "rank: ..." and "commit: ..."; the others are the coordinator's planning."""
    return step.partition(":")[0] if ":" in step else "plan"


NOTES = (
    (
        "Times are CPU seconds of one thread, medians. rank: what one rank does, beside the others. plan, "
        "commit: what the coordinator does alone. Nothing is written and nothing travels."
    ),
    (
        "first: plan is loads of all offers, merging them, dumps of the answers, loads of all placements; "
        "commit is making and rendering .metadata and manifest. later: verdict messages; rendering."
    ),
    (
        "stock, on every save: plan is loads of all local plans, create_global_plan, dumps of the answers; "
        "commit is loads of all write results, filling in and pickling .metadata."
    ),
    (
        "goal: stock's dumps (of one rank), loads and global plan, without its answers, against all of our "
        "rank and plan. with commit: the same against our rank, plan and commit. whole: all of stock's rank, "
        "plan and commit against all of ours."
    ),
)


def goal_seconds(case: Case) -> float | None:
    """Stock's dumps + loads + global plan, without its answers."""
    if not case.samples["stock"]:
        return None
    steps = ("rank: dumps", "loads", "global plan")
    return float(statistics.median(sum(sample[step] for step in steps) for sample in case.samples["stock"]))


def ratios(case: Case) -> list[float | None]:
    """Stock's time to ours, in the order of RATIOS."""
    compared: list[float | None] = []
    for which in ("first", "later"):
        planned = sum(case.seconds(which, phase) or 0.0 for phase in PHASES[:2])
        whole = planned + (case.seconds(which, "commit") or 0.0)
        goal = goal_seconds(case)
        stock = sum(case.seconds("stock", phase) or 0.0 for phase in PHASES)
        compared += [None] * 3 if goal is None else [goal / planned, goal / whole, stock / whole]
    return compared


RATIOS = tuple(
    f"{which}: {ratio}" for which in ("first", "later") for ratio in ("goal", "with commit", "whole")
)


def table(cases: Sequence[Case]) -> str:
    """Milliseconds, ratios and bytes."""
    head = ["layout", "ranks", "n"]
    head += [f"{which}: {phase}" for which in ("first", "later", "stock") for phase in PHASES]
    head += [*RATIOS, "up, first", "up, later", "up, stock"]
    rows = [head]
    for case in cases:
        cells = [case.layout, str(case.world_size), str(len(case.samples["first"]))]
        for which in ("first", "later", "stock"):
            for phase in PHASES:
                seconds = case.seconds(which, phase)
                cells.append("-" if seconds is None else f"{seconds * 1000:.1f} ms")
        cells += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios(case)]
        up = [
            case.nbytes["offers"] + case.nbytes["placements"],
            case.nbytes["verdict up"],
            case.stock_nbytes.get("plans"),
        ]
        cells += ["-" if size is None else f"{size / 2**20:.2f} MiB" for size in up]
        rows.append(cells)
    return markdown.table(rows)


def as_json(
    configuration: Mapping[str, Any], facts: Mapping[str, Any], store: Times, cases: Sequence[Case]
) -> str:
    """Everything, samples in order of taking."""
    results = [
        dataclasses.asdict(case)
        | {"medians": {which: case.median(which) for which in case.samples}}
        | {"ratios": dict(zip(RATIOS, ratios(case), strict=True))}
        for case in cases
    ]
    whole = {"configuration": configuration, "machine": facts, "store": store, "cases": results}
    return json.dumps(whole, indent=1) + "\n"


def as_markdown(
    configuration: Mapping[str, Any],
    facts: Mapping[str, Any],
    store: Times,
    cases: Sequence[Case],
    layouts: Mapping[str, str],
) -> str:
    """The table, what it stands on, what its words mean."""
    described = "; ".join(f"{key} {value}" for key, value in {**facts, **configuration}.items())
    calls = ", ".join(f"{call} {seconds * 1e6:.0f} us" for call, seconds in store.items())
    notes = [f"{name}: {what}" for name, what in layouts.items()]
    notes += [*NOTES, f"One call to the store: {calls}."]
    lines = ["# Planning: dcp_async, stock DCP", "", f"{described}.", "", table(cases), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]) + "\n"
