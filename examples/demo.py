"""Train, be killed in the middle of a save, resume, compare: what dcp_async promises, on a real training run.

In: nothing; the training runs are processes of their own, async_trainer.py beside this file. Out: a report on
stdout, and exit status 0 only if every claim in it held. It claims nothing it did not see: a kill counts when
the disk shows a save that was cut short, a resume when its weights are bit-identical to those of a run that
nobody killed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import staging

from async_trainer import Trainer, parse_options, weights_digest
from dcp_async import CheckpointEngine

TRAINER = Path(__file__).with_name("async_trainer.py")
Event = dict[str, Any]  # one of the trainer's JSON lines
TIMEOUT = 600.0  # seconds; ten times what the demo takes, so that a hang ends as a failure


async def demo(options: argparse.Namespace, directory: Path) -> None:
    """Run the five chapters in `directory`; raises DemoError when a claim does not hold."""
    screen = Screen()
    steps = ("--steps", str(options.steps), "--save-every", str(options.save_every), "--log-every", "6")
    reference, killed = directory / "reference", directory / "killed"

    with screen.chapter("1. A training run that nobody interrupts"):
        expected = await run_to_its_end(screen, reference, steps)
        shutil.rmtree(reference)  # one run's checkpoints on the disk at a time

    with screen.chapter("2. The same run, killed with SIGKILL in the middle of a save"):
        torn = await run_and_kill(screen, killed, steps, first_step=2 * options.save_every + 1)
        whole = [path for path in checkpoints(killed) if is_whole(path)]
        leftovers = files(torn)
        for path in checkpoints(killed):
            screen.line(describe(path))
        check(bool(whole), "no whole checkpoint was left to resume from")

    with screen.chapter("3. Started again, it resumes from the newest whole checkpoint"):
        resumed = await run_to_its_end(screen, killed, steps)
        newest = step_of(whole[-1])
        check(resumed["resumed_from"] == newest, f"resumed from {resumed['resumed_from']}, not from {newest}")
        check(resumed["sha256"] == expected["sha256"], "the weights are not those of the uninterrupted run")
        check(is_whole(torn) and not leftovers & files(torn), f"the torn {torn.name} was not cleared away")
        screen.line("bit-identical to the weights of the uninterrupted run")

    with screen.chapter("4. Stock torch.distributed.checkpoint.load reads the last checkpoint"):
        await read_with_stock(screen, killed, expected["sha256"])

    with screen.chapter("5. The same training state saved by stock async_save and by dcp_async"):
        await compare_with_stock(screen, killed, directory / "saves", options.rounds)


async def run_to_its_end(screen: Screen, out: Path, arguments: Sequence[str]) -> Event:
    """Run the trainer until it ends by itself; returns its last event, the result."""
    event: Event = {}
    async with trainer(out, arguments) as (process, events):
        async for event in events:
            screen.show(event)
        status = await process.wait()
    check(status == 0 and event.get("event") == "finished", f"the trainer ended with status {status}")
    return event


async def run_and_kill(screen: Screen, out: Path, arguments: Sequence[str], *, first_step: int) -> Path:
    """Kill the trainer while a save of `first_step` or later is being written; returns the torn directory.

    Whether the save was cut short is for the disk to say. If it was done before the signal came, the next
    run, which resumes from it, is killed at its next save.
    """
    while True:
        async with trainer(out, arguments) as (process, events):
            async for event in events:
                screen.show(event)
                match event:
                    case {"event": "save_progress", "step": step, "written_bytes": written, "nbytes": nbytes}:
                        if step >= first_step and 0 < written < nbytes:
                            os.kill(process.pid, signal.SIGKILL)
                            break
            status = await process.wait()
        check(status == -signal.SIGKILL, f"the trainer ended with status {status}, no save could be caught")
        screen.line(f"SIGKILL in the save of step {step}, with {written / nbytes:.0%} of its bytes written")
        torn = out / str(event["checkpoint_id"])
        if torn.is_dir() and not is_whole(torn):
            return torn
        screen.line("that save was complete before the signal came; trying again at the next one")


async def read_with_stock(screen: Screen, out: Path, digest: str) -> None:
    """Load the newest checkpoint with stock DCP and compare it, leaf by leaf, with what dcp_async reads."""
    async with CheckpointEngine(out) as engine:
        info = await engine.latest()
        if info is None:
            raise DemoError(f"no checkpoint in {out}")
        ours = await engine.read(info)
        names = (await info.metadata()).state_dict_metadata
    stock = blank(ours)
    dcp.load(stock, checkpoint_id=out / info.checkpoint_id, no_dist=True)

    ours_leaves, stock_leaves = dict(leaves(ours)), dict(leaves(stock))
    check(ours_leaves.keys() == stock_leaves.keys() == names.keys(), "the names of the leaves differ")
    different = [name for name in names if not is_identical(ours_leaves[name], stock_leaves[name])]
    check(not different, f"stock reads other values for {', '.join(different)}")
    check(weights_digest(stock["model"]) == digest, "the weights that stock reads are not the trainer's")
    nbytes = sum(leaf.nbytes for leaf in stock_leaves.values() if isinstance(leaf, Tensor))
    screen.line(f"{info.checkpoint_id}: {len(names)} values, {nbytes / 1e6:.0f} MB, all of them identical")


async def compare_with_stock(screen: Screen, trained: Path, directory: Path, num_rounds: int) -> None:
    """Save the trained state with each engine in turn and print the medians side by side."""
    options = parse_options(["--out", str(trained)])
    torch.set_num_threads(options.threads)
    state = Trainer(options).state
    async with CheckpointEngine(trained) as engine:
        nbytes = (await engine.load(state)).nbytes

    # A machine without an accelerator takes no other options; reused, the stager keeps its buffers.
    stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
    async with CheckpointEngine(directory) as engine:
        contestants: dict[str, Callable[[Path], Awaitable[Sample]]] = {
            "stock async_save": lambda path: save_with_stock(state, path),
            "stock, reused stager, 2 threads": lambda path: save_with_stock(
                state, path, storage_writer=dcp.FileSystemWriter(path, thread_count=2), async_stager=stager
            ),
            "dcp_async": lambda path: save_with_ours(state, path, engine),
        }
        samples: dict[str, list[Sample]] = {name: [] for name in contestants}
        # In turns, and each round in another order: a machine that drifts, drifts for all of them.
        order = list(contestants)
        for number in range(num_rounds + 1):
            for name in order:
                screen.progress(f"round {number}/{num_rounds}: {name}")
                path = directory / f"round-{number}-{list(contestants).index(name)}"
                sample = await contestants[name](path)
                check(is_whole(path), f"{name}: {path.name} was reported as saved, but has no .metadata")
                shutil.rmtree(path)
                if number > 0:  # round 0 warms up: buffers, plans, page tables
                    samples[name].append(sample)
            order.append(order.pop(0))
    stager.close()
    print_table(screen, samples, nbytes)


async def save_with_stock(state: dict[str, Any], path: Path, **settings: Any) -> Sample:
    began = time.perf_counter()
    upload = dcp.async_save(state, checkpoint_id=path, no_dist=True, **settings)
    stall = time.perf_counter() - began
    assert isinstance(upload, Future), "it is a response only with a stager that stages in the background"
    await asyncio.wrap_future(upload)
    return Sample(stall=stall, durable=time.perf_counter() - began)


async def save_with_ours(state: dict[str, Any], path: Path, engine: CheckpointEngine) -> Sample:
    began = time.perf_counter()
    response = await engine.save(state, checkpoint_id=path.name)
    stall = time.perf_counter() - began
    await response.upload_completion
    return Sample(stall=stall, durable=time.perf_counter() - began)


def print_table(screen: Screen, samples: dict[str, list[Sample]], nbytes: int) -> None:
    stalls = {name: [sample.stall for sample in taken] for name, taken in samples.items()}
    durables = {name: [sample.durable for sample in taken] for name, taken in samples.items()}
    num_rounds = len(samples["dcp_async"])
    screen.line(f"{nbytes / 1e6:.0f} MB; median (lowest to highest) of {num_rounds} warm saves, in turns")
    screen.line(f"{'':<32}{'stall, ms':>20}{'until durable, s':>24}{'GB/s':>8}")
    for name in samples:
        stall, durable = spread(stalls[name], 1e3, ".0f"), spread(durables[name], 1.0, ".2f")
        screen.line(f"{name:<32}{stall:>20}{durable:>24}{nbytes / median(durables[name]) / 1e9:>8.2f}")
    for name in samples:
        if name != "dcp_async":
            stall = ratio(stalls[name], stalls["dcp_async"])
            durable = ratio(durables[name], durables["dcp_async"])
            screen.line(f"{name} / dcp_async: stall {stall}, until durable {durable}")
    screen.line("Whatever else the machine does moves these figures; compare within this table only.")


def spread(values: list[float], scale: float, form: str) -> str:
    low, middle, high = (format(value * scale, form) for value in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """How many times ours goes into theirs, and whether the noise leaves that standing."""
    overlap = min(theirs) <= max(ours) and min(ours) <= max(theirs)
    return f"{median(theirs) / median(ours):.1f} x" + (" (within the noise)" if overlap else "")


@asynccontextmanager
async def trainer(out: Path, arguments: Sequence[str]) -> AsyncIterator[tuple[Process, AsyncIterator[Event]]]:
    """A running trainer and its events; it does not outlive the block."""
    command = (sys.executable, str(TRAINER), "--json", "--out", str(out), *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        yield process, read_events(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def read_events(process: Process) -> AsyncIterator[Event]:
    assert process.stdout is not None
    async for line in process.stdout:
        yield json.loads(line)


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("step-*"))


def is_whole(checkpoint: Path) -> bool:
    """A checkpoint exists when its .metadata does."""
    return (checkpoint / ".metadata").exists()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def describe(checkpoint: Path) -> str:
    nbytes = sum((checkpoint / name).stat().st_size for name in files(checkpoint))
    verdict = "whole" if is_whole(checkpoint) else "torn: no .metadata"
    return f"{checkpoint.name}: {verdict}, {nbytes / 1e6:.0f} MB in {', '.join(sorted(files(checkpoint)))}"


def files(checkpoint: Path) -> set[str]:
    return {file.name for file in checkpoint.iterdir()}


def leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts and lists under DCP's names for them; a list of plain values is one leaf."""
    match tree:
        case dict():
            children = list(tree.items())
        case list() if any(isinstance(child, (dict, Tensor)) for child in tree):
            children = list(enumerate(tree))
        case _:
            yield path, tree
            return
    for key, child in children:
        yield from leaves(child, f"{path}.{key}" if path else str(key))


def blank(tree: Any) -> Any:
    """The same structure with other values: what equals the original after a load was really read."""
    match tree:
        case dict():
            return {key: blank(child) for key, child in tree.items()}
        case list():
            return [blank(child) for child in tree]
        case Tensor():
            return (~raw_bytes(tree)).view(tree.dtype).view(tree.shape)
        case _:
            return None


def is_identical(left: object, right: object) -> bool:
    """Of one type and equal, tensors to the bit."""
    if type(left) is not type(right):
        return False
    match left, right:
        case Tensor(), Tensor():
            same_kind = left.dtype == right.dtype and left.shape == right.shape
            return same_kind and torch.equal(raw_bytes(left), raw_bytes(right))
        case (list() | tuple(), list() | tuple()):
            return len(left) == len(right) and all(map(is_identical, left, right))
        case _:
            equal: Any = left == right
            return equal if isinstance(equal, bool) else bool(equal.all())  # numpy compares by element


def raw_bytes(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def check(claim: bool, otherwise: str) -> None:
    if not claim:
        raise DemoError(otherwise)


class DemoError(Exception):
    """A claim of the demo did not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Seconds from the call of a save to its return, and to its last byte being durable."""

    stall: float
    durable: float


class Screen:
    """Plain lines, and on a terminal one at the bottom that is written over."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()

    def line(self, text: str) -> None:
        self.progress("")
        print(f"   {text}".rstrip(), flush=True)

    def progress(self, text: str) -> None:
        if self._is_terminal:
            width = shutil.get_terminal_size().columns - 4
            print(f"\r   {text[:width]:<{width}}\r", end="", flush=True)

    def show(self, event: Event) -> None:
        """Print what the trainer would print, and follow its steps in between."""
        if event["text"] is not None:
            self.line(event["text"])
        elif event["event"] == "step":
            self.progress(f"step {event['step']:>5}  loss {event['loss']:.3f}")

    @contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        print(title, flush=True)
        began = time.perf_counter()
        yield
        self.line(f"({time.perf_counter() - began:.0f} s)")
        print(flush=True)


async def run(options: argparse.Namespace) -> None:
    """Run the demo in a directory that goes with it, also when the demo is interrupted or terminated."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    # Not the system's temporary directory: that may be memory, and the demo is about disks.
    with tempfile.TemporaryDirectory(prefix="dcp_async-demo-", dir=options.dir) as directory:
        async with asyncio.timeout(TIMEOUT):
            await demo(options, Path(directory))


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dir", default=".", help="for a temporary directory of 1.5 GB (default: here)")
    parser.add_argument("--steps", type=int, default=30, help="of the training run (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=6, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison (default: %(default)s)")
    # Stock DCP warns that it saves in a single process, which it was told to.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
    began = time.perf_counter()
    try:
        asyncio.run(run(parser.parse_args()))
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except TimeoutError:
        print(f"demo failed: not done after {TIMEOUT:.0f} s", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo interrupted", file=sys.stderr)
        return 130
    print(f"every claim held; {time.perf_counter() - began:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
