"""The tables of a run of `bench.gpu`.

In: gpu.json, whole or of a run that was cut. Out: Markdown.
Keeps: a rate is what a save or a load moved in its time, whatever else it did then; goals are judged on an
accelerator only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..engines import ON_DEVICES, OURS, RAW
from . import markdown, results
from .results import Data
from .run_page import calls, failed, machine_line

OVERLAP = "dcp_async overlap"
ENGINES = tuple(engine for engine in ON_DEVICES if engine != RAW)
SECONDS: Mapping[str, str] = {
    "prepare()": "prepare",
    "first save: blocked": "first_blocked",
    "first save: staged": "first_staged",
    "blocked": "blocked",
    "staged": "staged",
    "staged beside pure Python": "staged_beside_python",
    "CPU while staging": "staging_cpu",
    "durable": "durable",
    "first load": "first_warm",
    "load": "warm",
    "a step, alone": "step_alone",
    "a step, while staging": "step_staging",
    "a step, while uploading": "step_uploading",
    "the longest step beside saves": "step_worst",
}
RATES: Mapping[str, str] = {"staged": "staged", "load": "warm"}
"""Rates that are derived, beside the figure they come from."""
MEMORY: Mapping[str, str] = {
    "extra memory of the host": "peak_extra_bytes",
    "extra memory of the device": "device_extra_bytes",
}
LINK: Mapping[str, str] = {
    "device to host: one copy, pinned": "one_pinned_copy",
    "device to host: one copy, pageable": "one_pageable_copy",
    "device to host: each tensor, pinned": "each_tensor",
    "device to host: packed on the device, one copy": "packed_on_the_device",
    "host to device: one copy, pinned": "one_pinned_copy_to_device",
    "disk: a write and fsync": "write",
    "disk: a buffered read, cached": "warm",
}
LARGE_SHARE = 0.9
MANY_TIMES = 3.0
NOTES = (
    (
        "Figures are medians of the rounds. blocked: until save() returned. staged: until the state may "
        "change; without overlap that is the stall. durable: until the checkpoint is on the disk."
    ),
    "prepare(): engine.prepare(state) before the first save; that engine makes no further ones.",
    "GB/s: the bytes of the state by the time of the line above.",
    "CPU while staging: user and system time of the whole process, from the call until staged.",
    (
        "Steps: 40 products of 2048 x 2048 bfloat16 matrices and a wait for the current stream, as a loss is "
        "looked at; medians."
    ),
    (
        "Loads come from the page cache into tensors on the device, verified by dcp_async; the first one by "
        "an engine that has no memory yet. What was loaded was compared bit for bit."
    ),
)


def whole(data: Data) -> str:
    """Everything on one page."""
    return f"# A state on an accelerator\n\n{included(data)}\n"


def included(data: Data) -> str:
    """What the documentation shows of it."""
    lines = [f"{data['machine'].get('device', '?')}; {machine_line(data)}", ""]
    if _is_cpu(data):
        lines += ["**No accelerator: this shows that the bench works, and nothing else.**", ""]
    for workload in data["workloads"]:
        lines += [section(data, workload), ""]
    return "\n".join([*lines, *(f"- {note}" for note in (*NOTES, *calls(data)))])


def _is_cpu(data: Data) -> bool:
    return bool(data["configuration"]["device"] == "cpu")


def section(data: Data, workload: str) -> str:
    """What one workload gave: the engines, the floors, the goals."""
    entry = data["workloads"][workload]
    title = f"## `{workload}`: {markdown.size(entry['nbytes'])} in {entry['num_tensors']:,} tensors"
    parts = [title, _engines(data, workload), _link(data, workload)]
    if verdicts := list(_goals(data, workload)):
        parts.append("\n".join(f"- {verdict}" for verdict in verdicts))
    return "\n\n".join([*parts, *failed(data, workload)])


def _engines(data: Data, workload: str) -> str:
    taken = {engine for group in results.groups(data, workload) for engine in group["samples"]}
    engines = [engine for engine in ENGINES if engine in taken]
    rows = [["", *engines]]
    for words, figure in SECONDS.items():
        values = [_value(data, workload, engine, figure) for engine in engines]
        if any(value is not None for value in values):
            rows.append([words, *("-" if value is None else markdown.figure(value, "s") for value in values)])
            if words in RATES:
                rows.append([f"{words}, GB/s", *(_rate(data, workload, value) for value in values)])
    for words, figure in MEMORY.items():
        values = [_value(data, workload, engine, figure) for engine in engines]
        rows.append([words, *("-" if value is None else markdown.figure(value, "MiB") for value in values)])
    return markdown.table(rows)


def _link(data: Data, workload: str) -> str:
    rows = [["the same bytes", "time", "GB/s"]]
    for words, figure in LINK.items():
        value = _value(data, workload, RAW, figure)
        if value is not None:
            rows.append([words, markdown.figure(value, "s"), _rate(data, workload, value)])
    return markdown.table(rows)


def _goals(data: Data, workload: str) -> Iterator[str]:
    copy = _value(data, workload, RAW, "one_pinned_copy")
    for engine in (OURS, OVERLAP):
        staged = _value(data, workload, engine, "staged")
        if copy is None or staged is None or _is_cpu(data):
            continue
        if workload == "large":
            share = copy / staged
            verdict = _met(share >= LARGE_SHARE)
            yield f"{engine}: {share:.0%} of one pinned copy's rate; goal {LARGE_SHARE:.0%}: {verdict}"
        if workload == "many":
            verdict = _met(staged / copy <= MANY_TIMES)
            yield f"{engine}: {staged / copy:.1f}x one transfer's time; goal {MANY_TIMES:g}x: {verdict}"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _value(data: Data, workload: str, engine: str, figure: str) -> float | None:
    medians = (results.median(group, engine, figure) for group in results.groups(data, workload))
    return next((median for median in medians if median is not None), None)


def _rate(data: Data, workload: str, seconds: float | None) -> str:
    return "-" if seconds is None else f"{data['workloads'][workload]['nbytes'] / seconds / 1e9:.3g}"
