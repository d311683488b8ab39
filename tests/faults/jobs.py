"""The programs that the fault tests run, kill and inspect; each is one function in `JOBS`.

In: a `Context` (pipes and tap) and JSON arguments. Out: JSON lines on the report pipe, and checkpoints on
disk. They use the package only through its public names, as a user's program would.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import gc
import json
import multiprocessing
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.utils.data

import dcp_async
import dcp_async._concurrency.loop_thread
import dcp_async.sync
from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    CheckpointExistsError,
    EngineStateError,
    KeepLatest,
    SaveError,
    StagingOptions,
    Timeouts,
)
from dcp_async.storage import TieredStorage
from tests.faults.calls import (
    CHANGES,
    SYNCS,
    UNLINKS,
    Both,
    Call,
    CallTap,
    Nth,
    Recorder,
    Watcher,
    When,
    end_process_now,
    is_data_write,
    tear,
)
from tests.faults.power import Trace
from tests.faults.preemption_job import preempt
from tests.faults.states import PART_BYTES, Trainer, files_of, flat, numbers, stock_target
from tests.support.clock import skip_time
from tests.support.doubles import FaultyStorage, faulty_storage

STEPS_OF_ANOTHER = 900
"""Step of the save that a test adds to make a fresh process sweep."""


class Line:
    """Reports go out as JSON lines; tokens come in, one byte each."""

    def __init__(self, report: int, gate: int) -> None:
        self._report, self.gate = report, gate

    def report(self, kind: str, **fields: object) -> None:
        data = json.dumps({"kind": kind, **fields}, default=str).encode() + b"\n"
        while data:
            data = data[os.write(self._report, data) :]

    def wait(self) -> None:
        """Blocks (without the GIL) until the test grants a token or opens the gate."""
        os.read(self.gate, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every job gets."""

    line: Line
    tap: CallTap


class Reporter:
    """Observer that puts every event on the pipe the moment it happens."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def on_event(self, event: Any) -> None:
        self._line.report("event", event=type(event).__name__, id=event.checkpoint_id, step=event.step)


def staging() -> StagingOptions:
    return StagingOptions(part_bytes=PART_BYTES)


def use_loop(name: str) -> None:
    """Replaces the engine's loop: "uvloop" (or whatever the package picks) or plain "asyncio"."""
    if name == "asyncio":
        setattr(dcp_async._concurrency.loop_thread, "default_loop_factory", lambda: asyncio.new_event_loop)  # noqa: B010 - for mypy


def describe(error: BaseException | None) -> dict[str, Any]:
    """An error with its causes, as JSON."""
    chain: list[dict[str, Any]] = []
    while error is not None and len(chain) < 8:
        entry: dict[str, Any] = {"type": type(error).__name__, "text": str(error), "errno": None}
        if isinstance(error, OSError):
            entry["errno"] = errno.errorcode.get(error.errno or 0)
        if isinstance(error, SaveError):
            entry |= {"id": error.checkpoint_id, "step": error.step, "phase": error.phase}
            entry["failures"] = {rank: repr(failure) for rank, failure in error.failures.items()}
        chain.append(entry)
        error = error.__cause__
    return {"chain": chain}


# The trainer that is killed at random moments


def train(context: Context, *, root: str, stop: int) -> None:
    """Trains from the latest checkpoint on and saves after every step, reporting all that happens."""
    line = context.line
    torch.set_num_threads(1)
    trainer = Trainer()

    def tick(call: Call) -> None:
        line.report("call", name=call.name, path=os.path.basename(call.path))

    context.tap.watch(root, When(lambda call: call.name in CHANGES, tick))

    async def main() -> None:
        line.report("opening")
        async with CheckpointEngine(root, staging=staging(), observer=Reporter(line)) as engine:
            state = trainer.targets()
            start = 0
            if await engine.latest():
                line.report("loading")
                start = (await engine.load(state)).next_step
                line.report("resumed", step=start - 1, found=flat(trainer.tree()))
            for step in range(start, stop):
                trainer.train(step)
                line.report("trained", step=step)
                await engine.save(state, step=step)
                line.report("returned", step=step)

    asyncio.run(main())
    line.report("finished")


def reference(context: Context, *, stop: int) -> None:
    """What an uninterrupted run holds after each step, without any checkpointing."""
    torch.set_num_threads(1)
    trainer = Trainer()
    for step in range(stop):
        trainer.train(step)
        context.line.report("after", step=step, found=flat(trainer.tree()))


# Looking at what is left


def inspect(
    context: Context, *, root: str, kind: str, then_save: bool = False, megabytes: float = 0.7
) -> None:
    """Reads every committed checkpoint through the package and through stock DCP, in this fresh process.

    `then_save`: afterwards one more save, before which leftovers go, and everything is read again.
    """

    async def read_all() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async with CheckpointEngine(root, staging=staging()) as engine:
            latest = await engine.latest()
            files = {}
            async for info in engine.checkpoints():
                try:
                    content = flat(await engine.read(info))
                    async with engine.checkpoint(info) as checkpoint:
                        attached = {name: str(await checkpoint.file(name)) for name in checkpoint.files}
                except CheckpointError as error:
                    content = {"error": repr(error)}
                    attached = content
                found[info.checkpoint_id] = {"step": info.step, "found": content}
                files[info.checkpoint_id] = {
                    "attached": attached,
                    "by_name": by_name(root, info.checkpoint_id),
                }
        return {
            "found": found,
            "files": files,
            "latest": latest and latest.checkpoint_id,
            "latest_step": latest and latest.step,
        }

    async def save_one() -> None:
        async with CheckpointEngine(root, staging=staging()) as engine:
            await (await engine.save(numbers(0), step=STEPS_OF_ANOTHER)).upload_completion

    answer = asyncio.run(read_all())
    answer |= {"stock": read_with_stock(root, kind, megabytes), "leftovers": leftovers(root)}
    if then_save:
        asyncio.run(save_one())
        swept = asyncio.run(read_all()) | {"stock": read_with_stock(root, kind, megabytes)}
        answer |= {"swept": swept | {"leftovers": leftovers(root)}}
    context.line.report("inspected", **answer)


def read_with_stock(root: str, kind: str, megabytes: float) -> dict[str, Any]:
    """What stock DCP makes of every directory that has a .metadata."""
    found: dict[str, Any] = {}
    for metadata in sorted(Path(root).glob("*/.metadata")):
        target = stock_target(kind, megabytes=megabytes)
        try:
            dcp.load(target, storage_reader=dcp.FileSystemReader(metadata.parent), no_dist=True)
        except dcp.api.CheckpointException as error:
            target = {"error": repr(error)}
        found[metadata.parent.name] = flat(target)
    return found


def by_name(root: str, name: str) -> dict[str, str]:
    """What other programs find beside a checkpoint's own files: name -> content."""
    return {
        path.name: str(path.read_bytes())
        for path in sorted((Path(root) / name).iterdir())
        if not path.name.startswith((".", "__", "manifest-"))
    }


def leftovers(root: str) -> list[str]:
    """What no committed checkpoint names, judged by the names of the format alone; a directory ends in a
    slash.
    """
    strays = []
    for directory in sorted(Path(root).iterdir()):
        if not directory.is_dir():
            strays.append(directory.name)
            continue
        names = {entry.name for entry in directory.iterdir()}
        owned = set()
        if ".metadata" in names:
            data = data_files(dcp.FileSystemReader(directory).read_metadata())
            uids = {name.rsplit("-", 1)[1].removesuffix(".distcp") for name in data}
            owned = {".metadata"} | data | {f"manifest-{uid}.json" for uid in uids}
            for uid in uids:
                attached = {name for name in names if name.startswith(f".attached-{uid}-")}
                owned |= attached | {name.removeprefix(f".attached-{uid}-") for name in attached}
        else:
            strays.append(f"{directory.name}/")
        strays += [f"{directory.name}/{name}" for name in sorted(names - owned)]
    return strays


def data_files(metadata: Any) -> set[str]:
    return {info.relative_path for info in metadata.storage_data.values()}


# One save, with something done to it


def save(
    context: Context,
    *,
    root: str,
    version: int,
    step: int,
    replace: bool = False,
    die_at: int = 0,
    pause_at: int = 0,
    meet_at: str = "",
    halt: bool = False,
    record: bool = False,
    hold: bool = False,
    is_late: bool = False,
    attach: bool = False,
    trace: str = "",
    sync_fails_at: int = 0,
    world: int = 1,
    rank: int = 0,
    port: int = 0,
) -> None:
    """Opens, saves one version, closes; reports the outcome. Counts start before `open()` and end after
    `close()`.

    `die_at`: SIGKILL at the n-th changing call (a write is torn in half). `pause_at`: wait at the gate before
    the n-th changing call or lock. `meet_at`: "save" waits at the gate before save(), "publish" before
    .metadata is linked or renamed. `halt`: wait at the gate before every changing call. `hold`: before each
    write of data. `is_late`: after one token the deadlines of all calls pass, the second one ends the wait.
    `trace`: a file for what a power cut could have taken. `sync_fails_at`: the n-th sync fails with EIO, and
    those after it would not. `world`: how many ranks save together, the first of which tells the others the
    `port` of its store.
    """
    line = context.line
    if world > 1:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=rank == 0, wait_for_workers=False)
        line.report("serving", port=store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    loops: list[asyncio.AbstractEventLoop] = []

    def new_loop() -> asyncio.AbstractEventLoop:
        loops.append(asyncio.new_event_loop())
        return loops[-1]

    if is_late:
        setattr(dcp_async._concurrency.loop_thread, "default_loop_factory", lambda: new_loop)  # noqa: B010 - for mypy

    def die(call: Call) -> None:
        line.report("dies", call=repr(call))
        tear(call)
        end_process_now()

    def pause(call: Call) -> None:
        line.report("paused", call=repr(call))
        line.wait()
        if is_late:
            for loop in loops:
                loop.call_soon_threadsafe(skip_time, loop, timeouts.storage + 1)
            line.wait()

    def fail(call: Call) -> None:
        line.report("fails", path=call.path)
        raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)

    timeouts = Timeouts()
    counter = Nth(CHANGES, die_at, die)
    recorder, traced = Recorder(), Trace()
    watchers: list[Watcher] = [counter, Nth(CHANGES | {"flock"}, pause_at, pause)]
    watchers.append(When(Call.publishes, lambda call: line.report("published"), moment="after"))
    if meet_at == "publish":
        watchers.append(When(Call.publishes, pause))
    if hold:
        watchers.append(When(is_data_write, pause))
    if halt:
        watchers.append(When(lambda call: call.name in CHANGES, pause))
    if record:
        watchers.append(recorder)
    if trace:
        watchers.append(traced)
    if sync_fails_at:
        watchers.append(Nth(SYNCS, sync_fails_at, fail))  # the last one: that it was begun is recorded
    context.tap.watch(root, Both(*watchers))

    async def main() -> None:
        async with CheckpointEngine(
            root, staging=staging(), timeouts=timeouts, observer=Reporter(line)
        ) as engine:
            if meet_at == "save":
                line.report("paused", call="save()")
                line.wait()
            try:
                files = files_of(version) if attach else None
                response = await engine.save(numbers(version), step=step, files=files, replace=replace)
                await response.upload_completion
            except CheckpointExistsError as error:
                line.report("outcome", outcome="exists", **describe(error))
            except SaveError as error:
                line.report("outcome", outcome="failed", **describe(error))
            else:
                recorder.log.append(("end", "committed", "", ""))
                traced.mark(version)
                line.report("outcome", outcome="committed")

    asyncio.run(main())
    if world > 1:
        dist.destroy_process_group()
    if trace:
        traced.dump(trace)
    line.report("done", count=counter.count, log=recorder.log)


# The end of the process with an engine still open, and the ways out of a block


def hold_until_main_ends(context: Context, root: str) -> None:
    """Keeps each data write waiting until the main thread has come to its end, so that the save is surely
    pending then.
    """
    context.tap.watch(root, When(is_data_write, lambda call: threading.main_thread().join()))


def hold_at_gate(context: Context, root: str) -> None:
    def wait(call: Call) -> None:
        context.line.report("held")
        context.line.wait()

    context.tap.watch(root, When(is_data_write, wait))


def fail_at_main_end(context: Context, root: str) -> None:
    def fail(call: Call) -> None:
        threading.main_thread().join()
        raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)

    context.tap.watch(root, When(is_data_write, fail))


def refuse_writes(context: Context, root: str) -> None:
    """Each data write waits for the block to be left, then fails."""

    def fail(call: Call) -> None:
        context.line.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)

    context.tap.watch(root, When(is_data_write, fail))


HOLDS: dict[str, Callable[[Context, str], None]] = {
    "none": lambda context, root: None,
    "until main ends": hold_until_main_ends,
    "at the gate": hold_at_gate,
    "refuses": refuse_writes,
    "fails after main's end": fail_at_main_end,
}


def leave_open(
    context: Context,
    *,
    root: str,
    style: str,
    hold: str = "until main ends",
    loop: str = "uvloop",
    exit_grace: float = 20.0,
    ending: str = "returns",
    saves: int = 1,
) -> None:
    """Saves and runs off the end of the script with the engine open."""
    use_loop(loop)
    HOLDS[hold](context, root)
    atexit.register(context.line.report, "atexit")
    timeouts = Timeouts(exit_grace=exit_grace)
    limits = dcp_async.Limits(pending_saves=max(1, saves))
    if style == "sync":
        blocking = dcp_async.sync.CheckpointEngine(root, staging=staging(), timeouts=timeouts, limits=limits)
        blocking.open()
        for step in range(saves):
            blocking.save(numbers(step), step=step)
    else:
        engine = CheckpointEngine(root, staging=staging(), timeouts=timeouts, limits=limits)

        async def save_all() -> None:
            for step in range(saves):
                await engine.save(numbers(step), step=step)

        async def all_in_one() -> None:
            await engine.open()
            await save_all()

        if style == "one run":
            asyncio.run(all_in_one())
        else:
            asyncio.run(engine.open())
            asyncio.run(save_all())
        if style == "forgotten":
            del engine, save_all, all_in_one
            gc.collect()
    context.line.report("main ends")
    if ending == "raises":
        raise ValueError("the trainer's own error")
    if ending == "exits":
        sys.exit(7)


def leave_block(
    context: Context,
    *,
    root: str,
    way: str,
    hold: str = "at the gate",
    loop: str = "uvloop",
    exit_grace: float = 20.0,
) -> None:
    """Leaves `async with` in one of several ways while a save is pending."""
    use_loop(loop)
    line = context.line
    HOLDS[hold](context, root)

    async def sibling() -> None:
        """Tells the test when asyncio.run cancels everything, which is what a second interrupt does."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            line.report("all cancelled")
            raise

    async def main() -> None:
        # A signal that comes right before select() does not end it, unless some signal has a handler of the
        # loop's: then all of them write to a descriptor that the loop waits for.
        asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, lambda: None)
        other = asyncio.create_task(sibling())
        timeouts = Timeouts(exit_grace=exit_grace)
        async with CheckpointEngine(
            root, staging=staging(), timeouts=timeouts, observer=Reporter(line)
        ) as engine:
            await engine.save(numbers(1), step=1)
            line.report("saving")
            if way == "raises":
                raise ValueError("the trainer's own error")
            if way == "exits":
                sys.exit(7)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                # Said in the loop's next turn, when the block's end has begun to wait. A second interrupt
                # that came while this line runs would be the first one that the engine sees.
                asyncio.get_running_loop().call_soon(line.report, "cancelled")
                raise
        other.cancel()

    try:
        asyncio.run(main())
    except BaseException as error:
        line.report(
            "left", type=type(error).__name__, text=str(error), context=type(error.__context__).__name__
        )
        raise


def interrupt_sync(context: Context, *, root: str, where: str, exit_grace: float = 20.0) -> None:
    """KeyboardInterrupt inside the blocking twin: in `save()` while staging waits for memory, or in
    `result()`.
    """
    line = context.line
    hold_at_gate(context, root)
    options = staging()
    if where == "save":
        # Smaller than the state, so that staging waits for the writers, and those wait at the gate.
        options = StagingOptions(part_bytes=PART_BYTES, budget_bytes=2 * PART_BYTES)
    timeouts = Timeouts(exit_grace=exit_grace)

    def interrupted(number: int, frame: object) -> None:
        line.report("signal")
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        with dcp_async.sync.CheckpointEngine(root, staging=options, timeouts=timeouts) as engine:
            try:
                line.report("saving")
                response = engine.save(numbers(1, megabytes=8), step=1)
                line.report("returned")
                response.upload_completion.result()
            except KeyboardInterrupt:
                line.report("interrupted")
                raise
    except BaseException as error:
        line.report("left", type=type(error).__name__, text=str(error))
        raise


# Forks


def verbs(engine: CheckpointEngine) -> dict[str, Callable[[], object]]:
    """Every verb of the engine as a blocking call."""

    async def listing() -> list[str]:
        return [info.checkpoint_id async for info in engine.checkpoints()]

    return {
        "save": lambda: asyncio.run(engine.save(numbers(9), step=9)),
        "load": lambda: asyncio.run(engine.load(numbers(9))),
        "read": lambda: asyncio.run(engine.read()),
        "latest": lambda: asyncio.run(engine.latest()),
        "checkpoints": lambda: asyncio.run(listing()),
        "wait": lambda: asyncio.run(engine.wait()),
        "open": lambda: asyncio.run(engine.open()),
    }


def blocking_verbs(engine: dcp_async.sync.CheckpointEngine) -> dict[str, Callable[[], object]]:
    return {
        "sync save": lambda: engine.save(numbers(9), step=9),
        "sync load": lambda: engine.load(numbers(9)),
        "sync read": lambda: engine.read(),
        "sync latest": lambda: engine.latest(),
        "sync checkpoints": lambda: list(engine.checkpoints()),
        "sync wait": lambda: engine.wait(),
    }


def attempt(verb: Callable[[], object]) -> str:
    try:
        verb()
    except Exception as error:
        return type(error).__name__
    return "returned"


def fork_with_engine(context: Context, *, root: str, twin: str, closing: str) -> None:
    """Forks while a save is held; the child tries every verb and ends; then the parent's save goes on."""
    line = context.line
    hold_at_gate(context, root)
    if twin == "sync":
        blocking = dcp_async.sync.CheckpointEngine(root, staging=staging())
        blocking.open()
        response = blocking.save(numbers(1), step=1)
        calls = blocking_verbs(blocking)
        closers: dict[str, Callable[[], object]] = {"close": blocking.close, "abort": blocking.abort}
    else:
        engine = CheckpointEngine(root, staging=staging())
        asyncio.run(engine.open())
        response = asyncio.run(engine.save(numbers(1), step=1))
        calls = verbs(engine)
        closers = {
            "close": lambda: asyncio.run(engine.close()),
            "abort": lambda: asyncio.run(engine.abort()),
        }
    pid = os.fork()
    if pid == 0:
        for name, verb in calls.items():
            line.report("child", verb=name, outcome=attempt(verb))
        if closing in closers:
            line.report("child closed", outcome=attempt(closers[closing]))
        if closing == "_exit":
            os._exit(0)
        if closing == "collected":
            del response, calls, closers
            gc.collect()
        line.report("child ends")
        return
    line.report("forked", pid=pid)
    _, status = os.waitpid(pid, 0)
    line.report("child reaped", status=os.waitstatus_to_exitcode(status))
    line.wait()
    info = response.upload_completion.result(60)
    line.report("committed", id=info.checkpoint_id)
    closers["close"]()


def fork_in_block(context: Context, *, root: str) -> None:
    """The child leaves `with` itself, by an error, as a worker that lost its way would."""
    line = context.line
    hold_at_gate(context, root)
    pid = -1
    with (
        contextlib.suppress(EngineStateError, ZeroDivisionError),
        dcp_async.sync.CheckpointEngine(root, staging=staging()) as engine,
    ):
        engine.save(numbers(1), step=1)
        pid = os.fork()
        if pid == 0:
            raise ZeroDivisionError
        line.report("forked", pid=pid)
        _, status = os.waitpid(pid, 0)
        line.report("child reaped", status=os.waitstatus_to_exitcode(status))
        line.wait()
    if pid == 0:
        line.report("child left")


def leave_child_behind(context: Context, *, root: str, how: str) -> None:
    """Starts a process that outlives this one while a save is held; the test kills this one.

    `how`: "fork", "exec", or "fork while locking": by another thread while a lease that is open gets locked.
    """
    line = context.line

    def fork_survivor() -> None:
        if os.fork() == 0:
            line.report("survivor", pid=os.getpid())
            line.wait()
            os._exit(0)

    def hold(call: Call) -> None:
        if is_data_write(call):
            line.report("held")
            line.wait()
        elif call.name == "flock" and how == "fork while locking":
            forking = threading.Thread(target=fork_survivor)
            forking.start()
            # A package that keeps forks out until the lease is complete lets this one in afterwards.
            forking.join(1.0)

    context.tap.watch(root, When(lambda call: True, hold))
    engine = dcp_async.sync.CheckpointEngine(root, staging=staging())
    engine.open()
    engine.save(numbers(1), step=1)
    if how == "fork":
        fork_survivor()
    elif how == "exec":
        reader = f"import os; os.read({line.gate}, 1)"
        survivor = subprocess.Popen([sys.executable, "-S", "-c", reader], pass_fds=[line.gate])
        line.report("survivor", pid=survivor.pid)
    line.report("forked")
    threading.Event().wait()


def wait_for(event: threading.Event) -> None:
    event.wait()


class Squares(torch.utils.data.Dataset[torch.Tensor]):
    """Items that a worker computes and can be checked."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((256,), float(index)) ** 2


def load_data_while_saving(context: Context, *, root: str, rounds: int) -> None:
    """Forks data-loading workers while saves are under way.

    In every other round the writes wait for the workers' first batch, so that the forks surely fall into the
    save; in the rest nothing waits, so that they may fall into a write.
    """
    line = context.line
    forked = threading.Event()
    context.tap.watch(root, When(is_data_write, lambda call: wait_for(forked)))

    async def main() -> None:
        async with CheckpointEngine(root, staging=staging()) as engine:
            for step in range(rounds):
                if step % 2:
                    # else the earlier save's writes would wait as well, with the memory that this one needs
                    await engine.wait()
                    forked.clear()
                else:
                    forked.set()
                response = await engine.save(numbers(step, megabytes=12), step=step)
                loader = torch.utils.data.DataLoader(
                    Squares(), batch_size=8, num_workers=2, multiprocessing_context="fork"
                )
                total = 0.0
                for batch in loader:
                    if not total:
                        line.report("first batch", step=step, pending=not response.upload_completion.done())
                        forked.set()
                    total += float(batch.sum())
                line.report("round", step=step, total=total)

    asyncio.run(main())

    async def check() -> None:
        async with CheckpointEngine(root, staging=staging()) as engine:
            for step in range(rounds):
                same = flat(await engine.read(step)) == flat(numbers(step, megabytes=12))
                line.report("checked", step=step, same=same)

    asyncio.run(check())


# Errors of the disk


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writes past this offset of a file fail with EFBIG (CPython ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_up(
    context: Context, *, root: str, sizes: list[float], limit: float = 0, replace: bool = False
) -> None:
    """Saves states of the given sizes (MiB), one step each, with one engine; reports each outcome and goes
    on. `replace`: all of them as step 1, and what is there after each is read.

    `limit`: files may not grow past so many MiB while a state larger than that is saved; memory has to stay
    below it, since the limit holds for files in memory too.
    """
    line = context.line
    options = StagingOptions(part_bytes=PART_BYTES, budget_bytes=8 * PART_BYTES if limit else None)

    async def main() -> None:
        async with CheckpointEngine(root, staging=options) as engine:
            for step, megabytes in enumerate(sizes):
                over = limit and megabytes > limit
                with file_size_limit(int(limit * 2**20)) if over else contextlib.nullcontext():
                    try:
                        state = numbers(step, megabytes=megabytes)
                        at = 1 if replace else step
                        await (await engine.save(state, step=at, replace=replace)).upload_completion
                    except SaveError as error:
                        line.report("outcome", step=at, outcome="failed", **describe(error))
                    else:
                        line.report("outcome", step=at, outcome="committed")
                if replace:
                    there = flat(await engine.read(1))
                    label = there["/'label'"]
                    version = int(label.strip("'").split()[1])
                    whole = there == flat(numbers(version, megabytes=sizes[version]))
                    line.report("there", label=label, whole=whole)
            if replace:
                line.report("readable", leftovers=leftovers(root))
                return
            steps = [info.step or 0 async for info in engine.checkpoints()]
            wanted = {step: flat(numbers(step, megabytes=sizes[step])) for step in steps}
            good = [step for step in steps if flat(await engine.read(step)) == wanted[step]]
            line.report("readable", steps=steps, good=good, leftovers=leftovers(root))

    with contextlib.suppress(SaveError):
        # close() raises what nobody looked at; every failure here was looked at, so nothing may come.
        asyncio.run(main())
        line.report("closed")


def save_without_direct_io(context: Context, *, root: str) -> None:
    """A file system that refuses O_DIRECT at open, as several do."""
    line = context.line

    def refuse(call: Call) -> None:
        flags = call.args[1] if len(call.args) > 1 else 0
        if isinstance(flags, int) and flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), call.path)

    context.tap.watch(root, When(lambda call: call.name == "open", refuse))

    async def main() -> None:
        async with CheckpointEngine(root, staging=staging()) as engine:
            for step in range(2):
                await (await engine.save(numbers(step), step=step)).upload_completion
            good = [flat(await engine.read(step)) == flat(numbers(step)) for step in range(2)]
            line.report("readable", good=good)

    asyncio.run(main())


def fail_calls(context: Context, *, root: str, replace: bool, error: str, first: int, stride: int) -> None:
    """One engine, many saves, each with an error at another call; after each, what is on disk is read and a
    save retried.
    """
    line = context.line
    number = getattr(errno, error)
    at = first

    def fail(call: Call) -> None:
        # An engine that cannot even tidy up is another matter: errors come from making and writing only.
        if call.name not in UNLINKS | {"rmdir"}:
            line.report("fails", at=at, call=repr(call))
            raise OSError(number, os.strerror(number), call.path)

    async def main() -> None:
        nonlocal at
        async with CheckpointEngine(root, staging=staging()) as engine:
            await (await engine.save(numbers(0), step=1)).upload_completion
            old = 0
            while True:
                new, step = at, 1 if replace else 1 + at
                counter = Nth(CHANGES, at, fail)
                context.tap.watch(root, counter)
                outcome: dict[str, Any] = {}
                try:
                    await (await engine.save(numbers(new), step=step, replace=replace)).upload_completion
                except SaveError as failure:
                    outcome = describe(failure)
                context.tap.watch(root, None)
                steps = [info.step async for info in engine.checkpoints()]
                content = {s: flat(await engine.read(s))["/'label'"] for s in steps if s is not None}
                whole = [
                    flat(await engine.read(s)) == flat(numbers(int(label.strip("'").split()[1])))
                    for s, label in content.items()
                ]
                line.report(
                    "point",
                    at=at,
                    step=step,
                    failed=bool(outcome),
                    whole=all(whole),
                    content=content,
                    old=old,
                    **outcome,
                )
                if counter.count < at:
                    return
                await (await engine.save(numbers(new), step=step, replace=True)).upload_completion
                line.report("retried", same=flat(await engine.read(step)) == flat(numbers(new)))
                old, at = (new if replace else 0), at + stride

    asyncio.run(main())
    line.report("done", leftovers=leftovers(root))


class RandomFault:
    """What goes wrong in one save, drawn by chance: nothing, some calls of the system, or a verb."""

    NONE = "nothing"
    DISK = ("one call", "all calls from one on")
    VERBS = ("begin", "put", "seal", "commit", "abort", "list", "sweep")
    ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
    CALLS = CHANGES - UNLINKS - {"rmdir"}
    """A medium on which nothing can be removed either would show what failed: no program can help that."""

    def __init__(self, rng: random.Random, storage: FaultyStorage, *, is_real: bool) -> None:
        """``is_real``: somebody else makes calls of the system fail."""
        self.name = "the system" if is_real else rng.choice((self.NONE, *self.DISK, "a verb"))
        self.published = False
        self._at = rng.randint(1, 24)
        self._count = 0
        number = rng.choice(self.ERRORS)
        self._error = OSError(number, os.strerror(number))
        if self.name == "a verb":
            verb, nth = rng.choice(self.VERBS), rng.randint(1, 2)
            self.name = f"{verb} {nth}"
            storage.fail(verb, self._error, nth=nth, times=rng.choice((1, 9)))

    def before(self, call: Call) -> None:
        if self.name in self.DISK and call.name in self.CALLS:
            self._count += 1
            if self._count == self._at or (self._count > self._at and self.name == self.DISK[1]):
                raise OSError(self._error.errno, self._error.strerror, call.path)

    def after(self, call: Call) -> None:
        self.published |= call.publishes()


def save_with_faults(context: Context, *, root: str, saves: int, seed: int, is_real: bool = False) -> None:
    """One engine whose saves, new ones and replacements, meet faults by chance; then a healthy save, and
    what is there is read by another engine. `is_real`: the faults are the test's, and before and after the
    saves that meet them this waits at the gate."""
    line, rng = context.line, random.Random(seed)

    def turn() -> None:
        if is_real:
            line.report("turn")
            line.wait()

    async def save_one(engine: CheckpointEngine, step: int, version: int, replace: bool) -> None:
        await (await engine.save(numbers(version), step=step, replace=replace)).upload_completion

    async def main() -> None:
        async with faulty_storage(Path(root)) as storage, CheckpointEngine(storage) as engine:
            turn()
            for version in range(1, saves + 1):
                replace = version > 2 and rng.random() < 0.4
                step = rng.randint(1, version - 1) if replace else version
                fault, outcome = RandomFault(rng, storage, is_real=is_real), "committed"
                context.tap.watch(root, fault)
                try:
                    await save_one(engine, step, version, replace)
                except SaveError:
                    outcome = "failed"
                context.tap.watch(root, None)
                storage.heal()
                line.report(
                    "saved",
                    id=f"step-{step:08}",
                    version=version,
                    replace=replace,
                    outcome=outcome,
                    fault=fault.name,
                    is_too_late=fault.published,
                )
            turn()
            await save_one(engine, saves + 1, 0, replace=False)

    async def look() -> None:
        async with CheckpointEngine(root) as engine:
            found, whole = {}, True
            async for info in engine.checkpoints():
                content = flat(await engine.read(info))
                label = content["/'label'"]
                whole &= content == flat(numbers(int(label.strip("'").split()[1])))
                found[info.checkpoint_id] = label
        line.report("left", found=found, whole=whole, leftovers=leftovers(root))

    asyncio.run(main())
    asyncio.run(look())


# Saves that come while the process ends


class SavesWhenCollected:
    """Kept by a module, so that the interpreter collects it when it takes the modules down."""

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save

    def __del__(self) -> None:
        self._save()


KEPT: list[object] = []
"""What must live as long as the interpreter."""


def save_late(
    context: Context,
    *,
    root: str,
    when: str,
    style: str = "sync",
    fails: bool = False,
    catches: bool = False,
    exit_grace: float = 20.0,
) -> None:
    """Saves at a moment after the end of the main thread's code, and reports what became of it."""
    line = context.line
    timeouts = Timeouts(exit_grace=exit_grace)
    blocking = dcp_async.sync.CheckpointEngine(root, staging=staging(), timeouts=timeouts)
    engine = CheckpointEngine(root, staging=staging(), timeouts=timeouts)
    KEPT.extend((blocking, engine))

    def save_one(step: int) -> dcp_async.AsyncSaveResponse:
        if style == "sync":
            return blocking.save(numbers(step), step=step)
        return asyncio.run(engine.save(numbers(step), step=step))

    def save() -> None:
        if fails:
            context.tap.watch(root, When(is_data_write, fail))
        try:
            save_one(1)
        except CheckpointError as error:
            line.report("raised", **describe(error))
            if not catches:
                raise
        else:
            line.report("saved")

    def fail(call: Call) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), call.path)

    def make_engine_and_save() -> None:
        with dcp_async.sync.CheckpointEngine(root) as late:
            late.save(numbers(1), step=1)
        line.report("saved")

    def make_engine_save_and_leave() -> None:
        blocking.open()
        save()

    def train_on() -> None:
        threading.main_thread().join()
        save()
        line.report("trained on")

    if when == "atexit, registered before open":
        atexit.register(save)
    if when == "engine made in atexit":
        atexit.register(make_engine_and_save)
        return
    if when == "engine made in atexit and left open":
        atexit.register(make_engine_save_and_leave)
        return
    if style == "sync":
        blocking.open()
    else:
        asyncio.run(engine.open())
    first = save_one(0)
    if when != "never":
        first.upload_completion.result()
    if when in ("atexit, registered after open", "atexit, after sys.exit"):
        atexit.register(save)
    elif when == "atexit of threading":
        threading._register_atexit(save)  # type: ignore[attr-defined]  # that is the question
    elif when == "non-daemon thread":
        threading.Thread(target=train_on).start()
    elif when == "__del__":
        KEPT.append(SavesWhenCollected(save))
    line.report("main ends")
    if when == "atexit, after sys.exit":
        sys.exit(0)


def save_in_child(context: Context, *, root: str, fails: bool) -> None:
    """A process that multiprocessing starts runs off its end with an engine open."""
    child = multiprocessing.get_context("fork").Process(
        target=save_late, args=(context,), kwargs={"root": root, "when": "never", "fails": fails}
    )
    if fails:
        fail_at_main_end(context, root)
    child.start()
    child.join()
    context.line.report("child", status=child.exitcode)


def warm_up() -> None:
    """Pulls in what torch imports late. No backward here: autograd's threads do not survive a fork."""
    stock_target("trainer")


def retain(context: Context, *, root: str, first: int, count: int, die_at: int = 0, trace: str = "") -> None:
    """Saves steps on end and keeps the latest two; reports each that is durable. `die_at`: SIGKILL at the
    n-th call that changes a name below the root. `trace`: a file for what a power cut could have taken."""

    def die(call: Call) -> None:
        context.line.report("dies", call=repr(call))
        end_process_now()

    changes = frozenset({"rename", "unlink", "rmdir", "link", "fsync"})
    traced = Trace()
    context.tap.watch(root, traced if trace else Nth(changes, die_at, die))
    with dcp_async.sync.CheckpointEngine(root, retention=KeepLatest(2)) as engine:
        for step in range(first, first + count):
            engine.save(numbers(step), step=step).upload_completion.result()
            traced.mark(step)
            context.line.report("durable", step=step)
    if trace:
        traced.dump(trace)


def load_on(context: Context, *, root: str) -> None:
    """Has the newest checkpoint open, and loads what is newest by then, until it is told to stop."""
    line = context.line
    with dcp_async.sync.CheckpointEngine(root) as engine, engine.checkpoint() as checkpoint:
        line.report("reading", name=checkpoint.info.checkpoint_id, digest=flat(checkpoint.read()))
        gate, loads, steps = select.poll(), 0, set()
        gate.register(line.gate)
        while not gate.poll(0):
            target = numbers(-1)
            report = engine.load(target)
            assert report.step is not None
            assert flat(target) == flat(numbers(report.step)), f"step {report.step} is not what was saved"
            assert not report.skipped, report
            loads += 1
            steps.add(report.step)
        line.report("read", digest=flat(checkpoint.read()), loads=loads, steps=len(steps))


def replicate(context: Context, *, root: str, first: int, count: int, die_at: int = 0) -> None:
    """Saves steps near and reports each that is far. `die_at`: SIGKILL at the n-th call that changes anything
    below the far root."""
    near, far = Path(root) / "near", Path(root) / "far"

    def die(call: Call) -> None:
        context.line.report("dies", call=repr(call))
        tear(call)
        end_process_now()

    storage = TieredStorage(near, far, retry_seconds=0.0)
    context.tap.watch(str(far), Nth(CHANGES, die_at, die))
    with dcp_async.sync.CheckpointEngine(storage) as engine:
        for step in range(first, first + count):
            response = engine.save(numbers(step), step=step)
            response.upload_completion.result()
            context.line.report("near", step=step)
            response.replicated.result()
            context.line.report("far", step=step)
    asyncio.run(storage.close())


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job
    for job in (
        train,
        reference,
        inspect,
        save,
        leave_open,
        leave_block,
        interrupt_sync,
        fork_with_engine,
        fork_in_block,
        leave_child_behind,
        load_data_while_saving,
        fill_up,
        save_without_direct_io,
        fail_calls,
        save_with_faults,
        save_late,
        save_in_child,
        preempt,
        retain,
        load_on,
        replicate,
    )
}
ENDING = frozenset(
    {leave_open, leave_block, interrupt_sync, fork_with_engine, fork_in_block, fill_up, save_late}
)
"""The jobs whose way out of the interpreter is part of what is tested."""
