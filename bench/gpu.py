"""What does a checkpoint of a state on an accelerator cost: dcp_async beside stock DCP and the bare link.

Run as `python3 -m bench.gpu`, by an interpreter that has torch; it needs no network and installs nothing.
Writes gpu.json (every sample) after each workload, then gpu.md, which is printed. Each engine has a process
of its own; one round asks each in turn for one sample. `--device cpu` runs every line on small states.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cli, packages, reporting
from .engines import ON_DEVICES, OURS, PREPARED, RAW
from .measuring import (
    STATE_BYTES,
    WRONG_BITS,
    Child,
    Group,
    machine_facts,
    memory_available,
    progress,
    running,
)

WORKLOADS = ("large", "many", "llm")
SLOW_MANY = "stock pinned overlap"
"""Left out of `many`: thousands of tensors take stock seconds, and the other stock engine shows them."""
PATIENCE = 90.0
"""Seconds without an answer after which an engine is given up: several times the slowest sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The run that was asked for."""

    device: str
    workloads: tuple[str, ...]
    runs: int
    """Rounds, after the first save; each gives one sample of each figure and engine."""
    minutes: float
    """No workload is begun after that, and what a workload can do without is left out after its share."""
    scale: float
    out: Path
    directory: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of this process; the device is the one that torch finds if none was named."""
    parser = cli.parser(__doc__)
    cli.add_directory(parser)
    parser.add_argument("--device", help="of the states, as torch names it (the accelerator that it finds)")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--minutes", type=float, default=4.5, help="about how long (%(default)s)")
    parser.add_argument("--scale", type=float, help="fraction of each workload's tensors (1; on cpu 0.05)")
    given = parser.parse_args(arguments)
    workloads = tuple(given.workloads.split(","))
    if unknown := set(workloads) - set(WORKLOADS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(WORKLOADS)}")
    device = given.device or _accelerator()
    if device is None:
        parser.error("torch finds no accelerator here; --device cpu runs every line on the CPU")
    scale = (0.05 if device == "cpu" else 1.0) if given.scale is None else given.scale
    if given.runs < 1 or not 0 < scale <= 1 or given.minutes <= 0:
        parser.error("--runs is at least 1, --scale above 0 and at most 1, --minutes above 0")
    return Options(
        device=device,
        workloads=workloads,
        runs=given.runs,
        minutes=given.minutes,
        scale=scale,
        out=given.out,
        directory=given.dir,
    )


def _accelerator() -> str | None:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


class Share:
    """A workload's part of the time, from now on."""

    def __init__(self, seconds: float) -> None:
        self._begun, self._seconds = time.monotonic(), seconds

    def is_up(self, fraction: float) -> bool:
        """Whether that fraction of it has passed."""
        return time.monotonic() > self._begun + fraction * self._seconds

    def rounds(self, number: int, fraction: float) -> Iterator[int]:
        """That many rounds, but none past the first is begun when that fraction has passed."""
        for round_ in range(number):
            if round_ and self.is_up(fraction):
                progress(f"  the time is up after {round_} rounds")
                return
            yield round_


def measure(group: Group, given: Options, share: Share) -> None:
    """All samples of one workload."""
    group.take("link", only=[RAW])
    group.take("prepare", only=[PREPARED])
    group.take("first", prefix="first_", only=group.engines(but=[RAW]))
    saving = group.engines(but=[RAW, PREPARED])
    for round_ in share.rounds(given.runs, 0.4):
        group.take("save", rotate=round_, only=saving)
        group.take("disk", only=[RAW])
    group.take("memory", only=saving)
    if not share.is_up(0.7):
        group.take("beside", only=saving, seconds=1.0, saves=min(2, given.runs))
    # stock loads alike whatever it staged with, and so do ours
    loading = [engine for engine in saving if "overlap" not in engine]
    group.take("prepare_load", only=loading)
    group.take("load", prefix="first_", only=loading, cold=False)
    for round_ in share.rounds(given.runs, 1.0):
        group.take("load", rotate=round_, only=loading, cold=False)
    group.take("check", only=group.engines(but=[RAW, *loading]))
    group.fail_wrong()


def run(given: Options, directory: Path) -> reporting.Data:
    """Measure everything; gpu.json is whole after each workload."""
    configuration = {
        "device": given.device,
        "runs": given.runs,
        "scale": given.scale,
        "quick": False,
        "minutes": given.minutes,
    }
    data = reporting.new(configuration, machine_facts(directory))
    data["kind"] = "gpu"
    ends = time.monotonic() + 60 * given.minutes
    for number, workload in enumerate(given.workloads):
        left = ends - time.monotonic()
        engines = [engine for engine in ON_DEVICES if (workload, engine) != ("many", SLOW_MANY)]
        # on the host: the pool of each, and three copies for the link
        needed = (len(engines) + 3) * STATE_BYTES[workload] * given.scale
        if left <= 0 or needed > memory_available():
            progress(f"{workload}: not measured: {'the time is up' if left <= 0 else 'too little memory'}")
            continue
        progress(f"{workload}: {', '.join(engines)}")
        place = directory / workload
        with running(
            Child(engine, workload, given.scale, place, device=given.device, patience=PATIENCE)
            for engine in engines
        ) as group:
            measure(group, given, Share(left / (len(given.workloads) - number)))
        reporting.add(data, workload, group)
        reporting.write(data, given.out / "gpu.json")
    return data


def main() -> int:
    packages.require(packages.ENGINE)
    given = parse()
    with cli.scratch(given.directory) as directory:
        data = run(given, directory)
    print(reporting.write_all(data, given.out))
    progress(f"written: {given.out / 'gpu.json'}, gpu.md beside it")
    return cli.exit_status(
        f"{workload}, {engine}: {reason}"
        for workload in data["workloads"]
        for engine, reason in reporting.failures(data, workload).items()
        if engine.startswith(OURS) or engine == RAW or reason.startswith(WRONG_BITS)
    )


if __name__ == "__main__":
    sys.exit(main())
