"""The tables of a run of `bench.run`.

In: results.json, whole or of a run that was cut. Out: Markdown.
Keeps: a figure that was not taken shows as "-", an engine that failed as a line with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..engines import OURS, RAW, STOCK
from . import goals, markdown, results
from .markdown import Unit
from .results import Data

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
DESCRIPTIONS = {
    "large": "few large tensors",
    "llm": "a small Llama with AdamW",
    "many": "many small tensors",
    "mixed": "a mixture of experts: thousands of medium tensors and a few huge ones",
    "trainer": "the text transformer of `examples/async_trainer.py` with AdamW, really trained",
}
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
    return markdown.table(rows)


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
                *(markdown.figure(value, "s") for value in times),
                f"{times[3] / times[1]:.2f}",
                markdown.figure(results.percentile(calls_, 50), "s"),
                f"{loss * 100:.1f} %",
            ]
        )
    note = (
        "A save every 20 steps. The steps' times are without the `save()` call, which has its own column; "
        "the loss is of all: wall time per step beside saves against wall time per step without, in one "
        "process."
    )
    return "\n\n".join([markdown.table(rows), note, *failed(data, "trainer")])


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
            raw, stock = (markdown.times(ratios.pop(name, None)) for name in (RAW, STOCK))
            best = min(ratios, key=ratios.__getitem__, default=None)
            peer = f"{markdown.times(ratios[best])} {label(data, best)}" if best else "-"
            time = markdown.figure(ours.value, "s") if ours else "-"
            rows.append([f"`{workload}`: {words}", time, raw, peer, stock])
    return "\n\n".join([machine_line(data), markdown.table(rows)])


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


def shown_cell(cell: results.Cell | None, unit: Unit, engine: str) -> str:
    """A median, and how many times ours it is."""
    if cell is None:
        return "-"
    text = markdown.figure(cell.value, unit)
    small = unit == "MiB" and cell.value < 2**20  # a ratio of next to nothing says nothing
    if engine == OURS or cell.ratio is None or cell.ratio <= 0 or small:
        return text
    return f"{text} ({markdown.times(cell.ratio)})"
