"""The pages of a run, from its JSON alone: Markdown tables, and charts where matplotlib is installed.

In: results.json of bench/run.py, whole or of a run that was cut. Out: text and PNG files.
Keeps: a figure that was not taken shows as "-", an engine that failed as a line with its reason.
Belongs here: which figures a table has, units, words. Not here: what a figure is (sampling.py), medians and
ratios (results.py), goals (goals.py), pictures (charts.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..engines.roster import OURS, RAW
from ..measuring.processes import progress
from . import goals, results
from .results import Data

Unit = Literal["s", "MiB"]

COLUMNS: tuple[tuple[str, str, Unit], ...] = (
    ("stall", "staged", "s"),
    ("blocked", "blocked", "s"),
    ("durable", "durable", "s"),
    ("load, cold", "cold", "s"),
    ("load, warm", "warm", "s"),
    ("CPU per save", "cpu", "s"),
    ("extra memory", "peak_extra_bytes", "MiB"),
)
LOST_COLUMNS: tuple[tuple[str, str, Unit], ...] = (
    ("lost, tiny-op loop", "lost_tiny", "s"),
    ("lost, Python loop", "lost_python", "s"),
    ("durable, tiny-op loop", "durable_tiny", "s"),
    ("durable, Python loop", "durable_python", "s"),
    ("first save: stall", "first_staged", "s"),
    ("first save: durable", "first_durable", "s"),
)
README_WORKLOADS = ("large", "llm", "many")
README_FIGURES = (
    ("`save()` stalls", "staged"),
    ("durable", "durable"),
    ("load, cold cache", "cold"),
    ("load, warm cache", "warm"),
)
STOCK = "stock"
DESCRIPTIONS = {
    "large": "few large tensors",
    "llm": "a small Llama with AdamW",
    "many": "many small tensors",
    "mixed": "a mixture of experts: thousands of medium tensors and a few huge ones",
    "trainer": "the text transformer of `examples/async_trainer.py` with AdamW, really trained",
}
ALTERNATIVES = (
    "Bars: stall, time to durable, load and extra memory of every engine",
    "Distribution of the training step's time, and how long save() keeps the trainer",
)
NOTES = (
    (
        "Times are medians of n rounds, fewer for slow engines; in brackets, how many times ours in the same "
        "group of processes."
    ),
    "`*`: does not sync what it writes; its files and directories are synced from outside, in the time.",
    "stall: from the call until the state may be mutated. blocked: until the call returns.",
    (
        "raw limits: one `_foreach_copy_` into warm memory; a direct write and fsync; the faster of buffered "
        "and direct reads. All by two threads."
    ),
    (
        "load: into the live tensors, in place. dcp_async verifies checksums, the others verify nothing. "
        "cold: after `POSIX_FADV_DONTNEED`; the host of a virtual machine may still have the blocks."
    ),
    (
        "extra memory: the process's high-water mark over its first saves (`VmHWM`, page cache not in it), "
        "helper processes' anonymous memory included, less what it held before the engine was opened."
    ),
    (
        "lost: what the loop did not get of the time outside the blocked part, per save, beside back-to-back "
        "saves. durable beside a loop: the same saves. Who blocks until the end loses nothing outside it."
    ),
    "CPU: user and system time of the process and its helpers, from the call until durable.",
    "The state that each engine had loaded was compared bit for bit; a difference would be a failure.",
)


def write_all(data: Data, directory: Path) -> str:
    """The whole report and its charts in `directory`; returns the text."""
    text = whole(data)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.md").write_text(text, encoding="ascii")
    draw(data, directory)
    return text


def whole(data: Data) -> str:
    """Everything on one page."""
    lines = ["# dcp_async beside its peers", "", machine_line(data), ""]
    for workload in data["workloads"]:
        lines += [f"## {title(data, workload)}", "", section(data, workload), ""]
    lines += ["## Goals", "", goals.table(data), ""]
    lines += [*(f"- {note}" for note in (*NOTES, *calls(data)))]
    return "\n".join(lines) + "\n"


def section(data: Data, workload: str) -> str:
    """The tables of one workload."""
    if workload == "trainer":
        return trainer_table(data)
    tables = [table(data, workload, COLUMNS)]
    if any(results.cell(data, workload, OURS, figure) for _, figure, _ in LOST_COLUMNS[:2]):
        tables.append(table(data, workload, LOST_COLUMNS))
    else:
        tables.append(table(data, workload, LOST_COLUMNS[-2:]))
    return "\n\n".join([*tables, *failed(data, workload)])


def table(data: Data, workload: str, columns: Sequence[tuple[str, str, Unit]]) -> str:
    """Engines down, figures across."""
    rows = [["", *(name for name, _, _ in columns), "n"]]
    for engine in results.measured(data, workload):
        cells = [results.cell(data, workload, engine, figure) for _, figure, _ in columns]
        if any(cells):
            shown = [
                shown_cell(cell, unit, engine) for cell, (_, _, unit) in zip(cells, columns, strict=True)
            ]
            rows.append([label(data, engine), *shown, str(max(cell.num_samples for cell in cells if cell))])
    return aligned(rows)


def failed(data: Data, workload: str) -> list[str]:
    """One line for each engine that dropped out."""
    return [
        f"Failed: {label(data, engine)}: `{reason}`"
        for engine, reason in results.failures(data, workload).items()
    ]


def trainer_table(data: Data) -> str:
    """Real training: percentiles of steps without and beside saves, and what was lost of the throughput."""
    head = ["", "step p50", "step p99", "beside saves: p50", "p99", "p99 / p99", "save() call", "lost"]
    rows = [head]
    for engine in results.measured(data, "trainer"):
        plain, steps, calls_ = (
            results.pooled(data, engine, figure) for figure in ("plain_steps", "steps", "save_calls")
        )
        loss = goals.throughput_loss(data, engine)
        if not plain or not steps or loss is None:
            continue
        times = [results.percentile(values, percent) for values in (plain, steps) for percent in (50, 99)]
        rows.append(
            [
                label(data, engine),
                *(shown(value, "s") for value in times),
                f"{times[3] / times[1]:.2f}",
                shown(results.percentile(calls_, 50), "s"),
                f"{loss * 100:.1f} %",
            ]
        )
    note = (
        "A save every 20 steps. The steps' times are without the `save()` call, which has its own column; "
        "the loss is of all: wall time per step beside saves against wall time per step without, in one "
        "process."
    )
    return "\n\n".join([aligned(rows), note, *failed(data, "trainer")])


def readme(data: Data) -> str:
    """The README's table: ours, and how many times ours the bare machine, the best peer and stock take."""
    rows = [["", "dcp_async", "raw limit", "best of the others", "stock DCP"]]
    for workload in README_WORKLOADS:
        if workload not in data["workloads"]:
            continue
        others = [name for name in results.measured(data, workload) if not name.startswith(OURS)]
        for words, figure in README_FIGURES:
            ours = results.cell(data, workload, OURS, figure)
            ratios = {
                name: cell.ratio
                for name in others
                if (cell := results.cell(data, workload, name, figure)) is not None and cell.ratio is not None
            }
            raw, stock = (shown_ratio(ratios.pop(name, None)) for name in (RAW, STOCK))
            best = min(ratios, key=ratios.__getitem__, default=None)
            peer = f"{shown_ratio(ratios[best])} {label(data, best)}" if best else "-"
            time = shown(ours.value, "s") if ours else "-"
            rows.append([f"`{workload}`: {words}", time, raw, peer, stock])
    return "\n\n".join([machine_line(data), aligned(rows)])


def write_docs(data: Data, directory: Path) -> None:
    """What docs/performance.md includes, and the charts that these show."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.png"):
        if old.stem in DESCRIPTIONS:
            old.unlink()
    draw(data, directory)
    included = {
        "machine": machine_line(data),
        "goals": goals.table(data),
        "notes": "\n".join(f"- {note}" for note in NOTES),
        "calls": "\n".join(f"- {call}" for call in calls(data)),
    }
    for workload in DESCRIPTIONS:
        found = workload in data["workloads"]
        heading = f"{title(data, workload)}.\n\n" if found else ""
        text = heading + (section(data, workload) if found else "Not in this run.")
        if (directory / f"{workload}.png").exists():
            # From the page that includes this, beside the directory.
            text += f"\n\n![{ALTERNATIVES[workload == 'trainer']}]({directory.name}/{workload}.png)"
        included[workload] = text
    for name, text in included.items():
        (directory / f"{name}.inc").write_text(text + "\n", encoding="ascii")


def draw(data: Data, directory: Path) -> None:
    """The charts, if there is something to draw them with."""
    if importlib.util.find_spec("matplotlib") is None:
        progress("no charts: matplotlib is not installed here (`python3 noxfile.py bench` has it)")
        return
    from . import charts

    charts.draw(data, directory)


def machine_line(data: Data) -> str:
    """The machine and the run, in one sentence each."""
    machine, run = data["machine"], data["configuration"]
    taken = f", {run['seconds_taken'] / 60:.0f} minutes" if "seconds_taken" in run else ""
    text = (
        f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['file_system']}, Linux {machine['kernel']}, Python {machine['python']}, torch "
        f"{machine.get('torch', '?')}; {machine['started'][:10]}, {run['runs']} rounds at most{taken}, load "
        f"average {machine['load_average_at_start']} before."
    )
    if run["quick"] or run["scale"] != 1:
        text += f" **A quick look at {run['scale']:.0%} of the tensors: not to be quoted.**"
    return text


def title(data: Data, workload: str) -> str:
    """The workload and its size."""
    entry = data["workloads"].get(workload, {})
    size = f"{entry.get('num_tensors', 0):,} tensors, {entry.get('nbytes', 0) / 1e9:.2f} GB"
    return f"{workload}: {DESCRIPTIONS[workload]} ({size})"


def calls(data: Data) -> list[str]:
    """What each engine's row stands for."""
    return [f"{label(data, engine)}: `{fact['call']}`" for engine, fact in data["engines"].items()]


def label(data: Data, engine: str) -> str:
    """How a table calls an engine."""
    mark = data["engines"].get(engine, {}).get("mark", "")
    if engine == RAW:
        return "raw limits"
    return f"**{engine}**" if engine == OURS else f"{engine}{' ' + mark if mark else ''}".replace("*", "\\*")


def shown_ratio(ratio: float | None) -> str:
    """How many times ours."""
    return "-" if ratio is None else f"{ratio:.2g}x" if ratio < 10 else f"{ratio:.0f}x"


def shown_cell(cell: results.Cell | None, unit: Unit, engine: str) -> str:
    """A median, and how many times ours it is."""
    if cell is None:
        return "-"
    text = shown(cell.value, unit)
    small = unit == "MiB" and cell.value < 2**20  # a ratio of next to nothing says nothing
    if engine == OURS or cell.ratio is None or cell.ratio <= 0 or small:
        return text
    return f"{text} ({shown_ratio(cell.ratio)})"


def shown(value: float, unit: Unit) -> str:
    """A figure with its unit: seconds from 1 s on, milliseconds below."""
    if unit == "MiB":
        return f"{value / 2**20:.0f} MiB"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1000:.0f} ms" if abs(value) >= 0.01 else f"{value * 1000:.1f} ms"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "| --- |" + " ---: |" * (len(rows[0]) - 1))
    return "\n".join(lines)
