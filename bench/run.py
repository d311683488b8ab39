"""What does a checkpoint cost: dcp_async beside stock DCP, every peer and the bare machine, in one run.

Run as `python3 noxfile.py bench`, or `python -m bench.run` where the peers are installed. Writes
results.json (every sample) after each comparison, then the tables and charts that `bench.report` makes
of it. Each engine has a process of its own; one round asks each in turn for one sample of each figure; a
figure's number is the median over the rounds. What the goals compare comes first, in every workload; then
the other engines, beside ours again. When the time is up, no further round is begun past the third.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import cli, reporting
from .engines import (
    CORE,
    ENGINES,
    OTHERS,
    OURS,
    RAW,
    TRAINER_CORE,
    TRAINER_OTHERS,
    groups_that_fit,
    memory_needed,
)
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

FEWEST_ROUNDS = 3
LOST_WORKLOADS = ("large", "many")
"""Where the loops beside saves run: few large tensors, many small ones."""
CORE_SECONDS = {"large": 210, "many": 260, "llm": 180, "mixed": 150, "trainer": 220}
OTHERS_SECONDS = {"large": 270, "many": 330, "llm": 320, "mixed": 260, "trainer": 130}
"""About what each comparison takes on two cores: how the time that was given is shared out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The run that was asked for."""

    workloads: tuple[str, ...]
    engines: tuple[str, ...]
    runs: int
    """Rounds; each gives one sample of each figure and engine."""
    minutes: float
    scale: float
    """Fraction of each workload's tensors; 1 for figures that are quoted."""
    quick: bool
    out: Path
    directory: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options of this process."""
    everything = (*STATE_BYTES, "trainer")
    parser = cli.parser(__doc__)
    cli.add_directory(parser)
    parser.add_argument("--workloads", default=",".join(everything), help="default: %(default)s")
    parser.add_argument("--engines", default=",".join(ENGINES), help="ours is always among them (all)")
    parser.add_argument("--runs", type=int, help="rounds (5; with --quick 2)")
    parser.add_argument("--minutes", type=float, default=35.0, help="no round past the third then (35)")
    parser.add_argument("--scale", type=float, help="fraction of each workload's tensors (1; --quick 0.05)")
    parser.add_argument("--quick", action="store_true", help="a look in a few minutes; not to be quoted")
    given = parser.parse_args(arguments)
    workloads, engines = tuple(given.workloads.split(",")), tuple(given.engines.split(","))
    for asked, known in ((workloads, everything), (engines, tuple(ENGINES))):
        if unknown := set(asked) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    runs = (2 if given.quick else 5) if given.runs is None else given.runs
    scale = (0.05 if given.quick else 1.0) if given.scale is None else given.scale
    if runs < 1 or not 0 < scale <= 1 or given.minutes <= 0:
        parser.error("--runs is at least 1, --scale above 0 and at most 1, --minutes above 0")
    return Options(
        workloads=workloads,
        engines=tuple(engine for engine in ENGINES if engine in engines or engine == OURS),
        runs=runs,
        minutes=given.minutes,
        scale=scale,
        quick=given.quick,
        out=given.out,
        directory=given.dir,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Engines that are measured side by side over one workload."""

    workload: str
    engines: list[str]
    core: bool
    seconds: float
    """Its share of the time."""


def comparisons(given: Options, room: int) -> list[Comparison]:
    """What is measured, in order: first what the goals compare, then everybody else."""

    def asked(engines: Sequence[str]) -> list[str]:
        return [engine for engine in engines if engine in given.engines]

    planned = []
    for workload in given.workloads:
        engines = TRAINER_CORE if workload == "trainer" else CORE
        planned.append(
            Comparison(workload=workload, engines=asked(engines), core=True, seconds=CORE_SECONDS[workload])
        )
    for workload in given.workloads:
        if workload == "trainer":
            groups = [asked(TRAINER_OTHERS)]
        else:
            # Raw is in it again for the ratios of our other configurations.
            others = asked((RAW, *OTHERS))
            groups = groups_that_fit(others, int(STATE_BYTES[workload] * given.scale), room)
        seconds = OTHERS_SECONDS[workload] / len(groups)
        planned += [
            Comparison(workload=workload, engines=group, core=False, seconds=seconds)
            for group in groups
            if set(group) - {OURS, RAW}
        ]
    return planned


class Clock:
    """When a comparison has had its share; one that was quick leaves its time to those behind it."""

    def __init__(self, minutes: float, planned: Sequence[Comparison]) -> None:
        self._start = time.monotonic()
        self._factor = minutes * 60 / max(1.0, sum(comparison.seconds for comparison in planned))
        self._given = 0.0
        self._began = self._until = self._start

    def begin(self, comparison: Comparison) -> None:
        self._given += comparison.seconds * self._factor
        self._began, self._until = time.monotonic(), self._start + self._given

    def is_up(self, share: float) -> bool:
        """Whether the comparison has used that share of its time."""
        return time.monotonic() > self._began + share * (self._until - self._began)


def measure(group: Group, comparison: Comparison, given: Options, clock: Clock) -> None:
    """All samples of one comparison."""
    many = comparison.workload == "many"
    slow = [engine for engine in group.engines() if ENGINES[engine].slow_many and many]
    group.take("first", prefix="first_", only=group.engines())
    for round_ in _rounds(given, clock, 0.4):
        group.take("save", rotate=round_, only=group.engines(but=slow if round_ >= FEWEST_ROUNDS else ()))
        if round_ == 0:
            group.take("memory", only=group.engines(but=[RAW]))
    if comparison.workload in LOST_WORKLOADS:
        _measure_lost(group, comparison, given, slow)
    loading = [
        engine for engine in group.engines() if ENGINES[engine].loads and (comparison.core or engine != RAW)
    ]
    group.take("prepare_load", only=loading)
    for round_ in _rounds(given, clock, 1.0):
        group.take_loads(round_, only=[e for e in loading if e not in slow or round_ < FEWEST_ROUNDS])
    group.take("check", only=group.engines(but=[RAW, *loading]))
    group.fail_wrong()


def _measure_lost(group: Group, comparison: Comparison, given: Options, slow: Sequence[str]) -> None:
    seconds = 0.5 if given.quick else 5.0
    asynchronous = [engine for engine in group.engines() if ENGINES[engine].asynchronous]
    for round_ in range(min(given.runs, FEWEST_ROUNDS) if comparison.core else 1):
        # Each of these samples is a mean over seconds of saves already; for the slow ones one will do.
        now = [engine for engine in asynchronous if round_ == 0 or engine not in slow]
        for loop in ("tiny", "python"):
            # Slow engines have the one loop only: beside pure Python a save of stock's took over 5 minutes.
            some = now if loop == "tiny" else [e for e in now if e not in slow]
            group.take("lost", rotate=round_, only=some, loop=loop, seconds=seconds)


def measure_trainer(group: Group, comparison: Comparison, given: Options, clock: Clock) -> None:
    """Real steps, without and with saves, in turns of some seconds."""
    group.take("calibrate", only=group.engines()[:1])
    batch = next((int(figures["batch"][0]) for figures in group.samples.values()), 1)
    plain, saving = (3, 20) if given.quick else (10, 40)
    for round_ in _rounds(given, clock, 1.0):
        group.take("train", rotate=round_, only=group.engines(), batch=batch, plain=plain, saving=saving)


def _rounds(given: Options, clock: Clock, share: float) -> Iterator[int]:
    for round_ in range(given.runs):
        if round_ >= FEWEST_ROUNDS and clock.is_up(share):
            progress(f"  the time of this comparison is up after {round_} rounds")
            return
        yield round_


def group_of(comparison: Comparison, given: Options, clock: Clock, room: int, directory: Path) -> Group:
    """What the engines of one comparison gave; all failed where they would not fit into `room` bytes."""
    engines, workload = comparison.engines, comparison.workload
    needed = memory_needed(engines, int(STATE_BYTES.get(workload, 0) * given.scale))
    if needed > room:
        reason = f"{' + '.join(engines)} need {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB can be used"
        return Group([], failures=dict.fromkeys(engines, reason))
    take: Callable[[Group, Comparison, Options, Clock], None]
    take = measure_trainer if workload == "trainer" else measure
    with running(Child(engine, workload, given.scale, directory) for engine in engines) as group:
        take(group, comparison, given, clock)
    shutil.rmtree(directory)
    return group


def run(given: Options, directory: Path, path: Path) -> reporting.Data:
    """Measure everything; the file at `path` is whole after each comparison."""
    configuration = {
        "runs": given.runs,
        "scale": given.scale,
        "quick": given.quick,
        "minutes": given.minutes,
    }
    data = reporting.new(configuration, machine_facts(directory))
    room = int(memory_available() * 0.85)
    planned = comparisons(given, room)
    clock = Clock(given.minutes, planned)
    started = time.monotonic()
    for number, comparison in enumerate(planned):
        clock.begin(comparison)
        workload, engines = comparison.workload, ", ".join(comparison.engines)
        progress(f"comparison {number + 1} of {len(planned)}: {workload}: {engines}")
        group = group_of(comparison, given, clock, room, directory / str(number))
        reporting.add(data, workload, group, core=comparison.core)
        data["configuration"]["seconds_taken"] = round(time.monotonic() - started)
        data["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 2)
        reporting.write(data, path)
    return data


def main() -> int:
    given = parse()
    path = given.out / "results.json"
    with cli.scratch(given.directory) as directory:
        data = run(given, directory, path)
    print(reporting.write_all(data, given.out))
    progress(f"written: {path}, tables and charts beside it")
    return cli.exit_status(
        f"{workload}, {engine}: {reason}"
        for workload in data["workloads"]
        for engine, reason in reporting.failures(data, workload).items()
        if engine.startswith(OURS) or engine == RAW or reason.startswith(WRONG_BITS)
    )


if __name__ == "__main__":
    sys.exit(main())
