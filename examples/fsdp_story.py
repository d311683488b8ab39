"""A job loses a rank and half as many go on: what dcp_async promises over ranks, on a real training run.

In: the options of fsdp_reshard.py, which calls `main` where no torchrun has started it, and whose jobs this
starts. Out: an account on stdout, a chart of the loss, and exit status 0 only if every claim in it held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dcp_async import CheckpointEngine
from demo import (
    DemoError,
    Screen,
    blank,
    check,
    checkpoints,
    files,
    is_identical,
    is_whole,
    leaves,
    step_of,
)

JOB = Path(__file__).with_name("fsdp_reshard.py")
LOST = 3  # the rank of job A that is killed
LOSS_TOLERANCE = 0.005  # nats; other layouts add up in another order, and training makes more of it
TIMEOUT = 600.0  # seconds; far above what the story takes, so that a hang ends as a failure
Event = dict[str, Any]  # one of a rank's JSON lines
Losses = Mapping[int, float]  # by step


async def tell(options: argparse.Namespace, directory: Path) -> None:
    """Run the jobs of the story in `directory`; raises DemoError when a claim does not hold."""
    screen = Screen()
    out, whole_tensors = directory / "checkpoints", directory / "whole.pt"
    shared = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in options.shared]
    start = Launcher(screen, directory / "stderr", ("--json", f"--out={out}", *shared))

    with screen.chapter(
        "1. Job A, 4 ranks: FSDP2 x tensor parallel. Rank 3 is killed in the middle of a save"
    ):
        before, torn = await run_and_lose_rank(start, out, first_step=options.lose_at)
        whole = [path for path in checkpoints(out) if is_whole(path)]
        leftovers = files(torn) if torn.exists() else set()
        for path in sorted({*checkpoints(out), torn}):
            screen.line(f"{path.name}: {describe(path)}")
        check(bool(whole), "no whole checkpoint was left to resume from")

    with screen.chapter("2. Job B, 2 ranks: FSDP2 alone. It resumes from the newest whole checkpoint"):
        async with start.job(2, "--tp=1", f"--dump={whole_tensors}") as after:
            await after.run_to_its_end()
        origin = step_of(whole[-1])
        check(after.resumed_from == origin, f"resumed from {after.resumed_from}, not from {origin}")
        check(max(after.losses) == options.steps, f"it ended behind step {max(after.losses)}")
        check(is_whole(torn) and not leftovers & files(torn), f"the torn {torn.name} was not cleared away")
        screen.line(f"a rank of A had {before.layout}")
        screen.line(f"a rank of B has {after.layout}")

    with screen.chapter(f"3. The tensors that B began with, put together, beside {whole[-1].name}"):
        await compare_tensors(screen, whole[-1], torch.load(whole_tensors))

    with screen.chapter("4. The loss goes on where it was"):
        compare_losses(screen, before.losses, after.losses, origin)
        marks = {step_of(path): path != torn for path in checkpoints(out) if path <= torn}
        chart = draw(before.losses, after.losses, origin, marks)
        await asyncio.to_thread(Path(options.chart).write_text, chart)
        screen.line(f"the chart: {options.chart}")


async def run_and_lose_rank(start: Launcher, out: Path, *, first_step: int) -> tuple[Job, Path]:
    """Kill a rank of job A as it saves `first_step` or later; returns the ended job and the torn checkpoint.

    Whether the save was cut short is for the disk to say. If it was whole all the same, the job is started
    again, resumes from it and is killed in its next save.
    """
    screen = start.screen
    losses: dict[int, float] = {}
    while True:
        async with start.job(4, "--tp=2") as job:
            job.losses = losses
            step = await job.run_until_save(LOST, first_step)
            os.kill(job.pids[LOST], signal.SIGKILL)
            killed = time.perf_counter()
            screen.line(f"SIGKILL to rank {LOST}, process {job.pids[LOST]}, as it saves step {step}")
            status = await job.end()
        screen.line(f"the job ended by itself, {time.perf_counter() - killed:.1f} s later, status {status}")
        survivors = set(job.pids) - {LOST}
        check(status != 0, "a job that lost a rank ended well")
        check(job.errors.keys() == survivors, f"of {survivors} only {set(job.errors)} said why they stopped")
        torn = out / f"step-{step:08}"
        if not is_whole(torn):
            break
        screen.line("that save was whole before the signal came; once more, in the next one")
    check(job.blamed == {rank: [LOST] for rank in survivors}, f"not all blame rank {LOST}: {job.blamed}")
    screen.line(f"each survivor has a SaveError that names rank {LOST}")
    return job, torn


def describe(checkpoint: Path) -> str:
    if not checkpoint.exists():
        return "not there, nothing was left behind"
    data = [checkpoint / name for name in files(checkpoint) if name.endswith(".distcp")]
    nbytes = sum(file.stat().st_size for file in data)
    verdict = "whole" if is_whole(checkpoint) else "torn: no .metadata"
    return f"{verdict}, {nbytes / 1e6:.1f} MB in {len(data)} files"


async def compare_tensors(screen: Screen, checkpoint: Path, whole: dict[str, Any]) -> None:
    """Compare what job B's ranks held with `read` of the checkpoint and with stock's load, leaf by leaf."""
    async with CheckpointEngine(checkpoint.parent) as engine:
        ours = await engine.read(checkpoint.name, keys=["app"])
    stock = blank(ours)
    dcp.load(stock, checkpoint_id=checkpoint, no_dist=True)
    for what, tree in {"engine.read()": ours["app"], "stock dcp.load()": stock["app"]}.items():
        found, expected = dict(leaves(tree)), dict(leaves(whole))
        names = found.keys() ^ expected.keys()
        check(not names, f"{what} and the job differ in the names {sorted(names)}")
        different = [name for name in found if not is_identical(found[name], expected[name])]
        check(not different, f"{what} gives other values for {', '.join(different)}")
        tensors = [leaf for leaf in found.values() if isinstance(leaf, Tensor)]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        screen.line(f"{what:<17} the same {len(tensors)} tensors, {nbytes / 1e6:.1f} MB, bit for bit")


def compare_losses(screen: Screen, before: Losses, after: Losses, origin: int) -> None:
    """Check that the steps which both jobs took had the same losses, but for the order of their sums."""
    check(min(after) == origin + 1, f"B began with step {min(after)}, not with {origin + 1}")
    both = sorted(before.keys() & after.keys())
    check(bool(both), "there is no step that both jobs took")
    screen.line(f"{'step':>8}{'A, 4 ranks':>14}{'B, 2 ranks':>14}{'difference':>14}")
    for step in both if len(both) < 7 else (*both[:3], *both[-3:]):
        difference = abs(before[step] - after[step])
        screen.line(f"{step:>8}{before[step]:>14.6f}{after[step]:>14.6f}{difference:>14.6f}")
    worst = max(abs(before[step] - after[step]) for step in both)
    check(worst < LOSS_TOLERANCE, f"the losses of a step that both took differ by {worst:.4f}")
    screen.line(f"both took steps {both[0]} to {both[-1]}, with the same losses to {worst:.1e}")


class Launcher:
    """Starts the jobs of the story; none outlives its block."""

    def __init__(self, screen: Screen, stderr: Path, arguments: Sequence[str]) -> None:
        self.screen = screen
        self._stderr, self._arguments = stderr, arguments

    @asynccontextmanager
    async def job(self, num_ranks: int, *arguments: str) -> AsyncIterator[Job]:
        """A job under torchrun. What it wrote to stderr is shown if the block fails."""
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
        command = (*torchrun, f"--nproc-per-node={num_ranks}", str(JOB), *self._arguments, *arguments)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self._stderr.open("w") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=stderr, env=environment
            )
        job = Job(self.screen, process)
        try:
            yield job
        except DemoError:
            print(self._stderr.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            if process.returncode is None:
                # The ranks first: torchrun would wait for them, and leave them behind if it were killed.
                for pid in job.pids.values():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                with suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()


class Job:
    """A running job, and what its ranks have said so far."""

    def __init__(self, screen: Screen, process: Process) -> None:
        self.pids: dict[int, int] = {}  # by rank, as all but the losses
        self.blamed: dict[int, list[int]] = {}  # whom a rank's SaveError names
        self.errors: dict[int, str] = {}  # what ended a rank
        self.losses: dict[int, float] = {}  # by step
        self.resumed_from: int | None = None
        self.layout = ""
        self._screen, self._process = screen, process

    async def run_until_save(self, rank: int, first_step: int) -> int:
        """Follow the job until `rank` is in a save of `first_step` or a later one; returns which."""
        async for event in self._events():
            match event:
                case {"event": "save_started", "rank": saving, "step": int(step)}:
                    if saving == rank and step >= first_step:
                        return step
        raise DemoError(f"the job ended with status {await self._process.wait()} before that save")

    async def run_to_its_end(self) -> None:
        status = await self.end()
        check(status == 0, f"the job ended with status {status}")

    async def end(self) -> int:
        """Follow the job to its end and show why its ranks stopped; returns torchrun's status."""
        async for _ in self._events():
            pass
        for text in dict.fromkeys(self.errors.values()):
            ranks = sorted(rank for rank, error in self.errors.items() if error == text)
            self._screen.line(f"rank {', '.join(map(str, ranks))}: {text}")
        return await self._process.wait()

    async def _events(self) -> AsyncIterator[Event]:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if line.startswith(b"{"):  # gloo writes there too
                event: Event = json.loads(line)
                self._note(event)
                if event["event"] not in ("save_failed", "stopped"):  # those come from many ranks at once
                    self._screen.show(event)
                yield event

    def _note(self, event: Event) -> None:
        rank = event["rank"]
        match event["event"]:
            case "started":
                self.pids[rank] = event["pid"]
                self.resumed_from, self.layout = event["resumed_from"], event["layout"]
            case "step":
                self.losses[event["step"]] = event["loss"]
            case "save_failed":
                self.blamed[rank] = event["lost"]
            case "stopped":
                self.errors[rank] = event["error"]


def draw(before: Losses, after: Losses, origin: int, marks: Mapping[int, bool]) -> str:
    """The losses of both jobs as an SVG. `marks`: the saves of A by step, and whether each became whole."""
    left, top, width, height = 64, 64, 772, 320
    bottom, right = top + height, left + width
    last, killed = max(after), max(before)
    losses = [*before.values(), *after.values()]
    low, high = math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2
    blue, orange, red, grey = "#4285c4", "#e8710a", "#c5221f", "#5f6368"

    def x(step: float) -> float:
        return round(left + width * step / last, 1)

    def y(loss: float) -> float:
        return round(top + height * (high - loss) / (high - low), 1)

    def text(at_x: float, at_y: float, words: str, anchor: str = "start", style: str = "") -> str:
        return f'<text x="{at_x}" y="{at_y}" text-anchor="{anchor}" {style}>{words}</text>'

    def line(*ends: float, style: str) -> str:
        x1, y1, x2, y2 = ends
        return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {style}/>'

    def curve(points: Losses, style: str) -> str:
        path = " ".join(f"{x(step)},{y(loss)}" for step, loss in sorted(points.items()))
        return f'<polyline points="{path}" fill="none" stroke-linejoin="round" {style}/>'

    def mark(at_x: float, at_y: float, is_whole: bool) -> str:
        if is_whole:
            return f'<circle cx="{at_x}" cy="{at_y}" r="4.5" fill="{blue}"/>'
        cross = f"M{at_x - 4.5},{at_y - 4.5} l9,9 m0,-9 l-9,9"
        return f'<path d="{cross}" stroke="{red}" stroke-width="2.2"/>'

    font = f'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{grey}"'
    thick = f'stroke="{blue}" stroke-width="6" stroke-opacity="0.5"'
    thin = f'stroke="{orange}" stroke-width="2"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 24}" height="{bottom + 40}" {font}>',
        '<rect width="100%" height="100%" fill="white"/>',
        text(left, 26, "A rank is lost, half as many go on", style='font-size="18" fill="#202124"'),
        text(left, 46, "loss in nats a byte, by step"),
        f'<rect x="{x(origin)}" y="{top}" width="{x(killed) - x(origin)}" height="{height}" fill="#f1f3f4"/>',
    ]
    for half in range(round(low * 2), round(high * 2) + 1):
        at = y(half / 2)
        parts += [
            line(left, at, right, at, style='stroke="#dadce0"'),
            text(left - 10, at + 4, f"{half / 2:.1f}", "end"),
        ]
    ticks = (min(marks), 1, 2, 5, 10, 20, 50, 100, 200, 500, last)
    tick = next(size for size in ticks if last / size <= 12)
    parts += [text(x(step), bottom + 22, str(step), "middle") for step in range(0, last + 1, tick)]

    parts += [curve(before, thick), curve(after, thin)]
    parts += [mark(x(step), bottom, is_whole) for step, is_whole in marks.items()]
    parts.append(text(x((origin + killed) / 2), top + 18, f"steps {origin + 1} to {killed}", "middle"))
    parts.append(text(x((origin + killed) / 2), top + 34, "taken by both", "middle"))

    entry, legend_y = right - 236, top + 28
    parts += [
        f'<rect x="{entry - 12}" y="{legend_y - 14}" width="248" height="98" fill="white"/>',
        line(entry, legend_y, entry + 28, legend_y, style=thick),
        text(entry + 38, legend_y + 4, "job A: 4 ranks, FSDP2 x TP"),
        line(entry, legend_y + 22, entry + 28, legend_y + 22, style=thin),
        text(entry + 38, legend_y + 26, "job B: 2 ranks, FSDP2"),
        mark(entry + 14, legend_y + 44, True),
        text(entry + 38, legend_y + 48, "a whole checkpoint of A"),
        mark(entry + 14, legend_y + 66, False),
        text(entry + 38, legend_y + 70, "a rank of A is killed in a save"),
    ]
    return "\n".join([*parts, "</svg>", ""])


async def run_story(options: argparse.Namespace) -> None:
    """Tell the story in a directory that goes with it, also when it is interrupted or terminated."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="fsdp_reshard-", dir=options.dir) as directory:
        async with asyncio.timeout(TIMEOUT):
            await tell(options, Path(directory))


def main(options: argparse.Namespace) -> int:
    # Stock DCP warns that it loads in a single process, which it was told to.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    began = time.perf_counter()
    try:
        asyncio.run(run_story(options))
    except DemoError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"failed: not done after {TIMEOUT:.0f} s", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("interrupted", file=sys.stderr)
        return 130
    print(f"every claim held; {time.perf_counter() - began:.0f} s in all")
    return 0
