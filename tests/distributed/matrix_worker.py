"""Teams of real processes that save and load one case after the other, in any layout.

In: ``Teams.of(size)``, then ``Team.do(verb, ...)``, which runs the verb on all ranks and gives all answers.
Starting processes is what costs, so a team lives as long as its cases go well, and keeps what it has built;
each case opens an engine of its own. A team in which a case fails is ended, by pid: its ranks may not be
in step any more. Every wait has a deadline.
"""

from __future__ import annotations

import datetime
import os
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from dcp_async import Timeouts
from dcp_async.errors import IncompatibleStateError, SaveError
from dcp_async.sync import CheckpointEngine
from tests.distributed.layouts import (
    BLANK,
    SAVED,
    Loader,
    Run,
    bits,
    brief,
    build,
    check_common,
    check_loader,
    common_state,
    same,
    shortened,
    whole,
)
from tests.support.processes import CONTEXT

PATIENCE = 60.0
"""Seconds that a case may take; far above what a healthy one needs."""
TIMEOUTS = Timeouts(coordination=20.0, storage=30.0, exit_grace=10.0)
NAME = "saved"
"""Of the one checkpoint below each root."""


class CaseError(AssertionError):
    """A verb raised on some rank; the text has every rank's traceback."""


class Worker:
    """One rank: its verbs, and what they have built."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._runs: dict[tuple[str, str], Run] = {}

    def _run(self, family: str, layout: str, salt: int) -> Run:
        key = (family, layout)
        if key not in self._runs:
            self._runs[key] = build(family, layout)
        self._runs[key].fill(salt)
        return self._runs[key]

    @staticmethod
    def _engine(root: str) -> CheckpointEngine:
        return CheckpointEngine(root, timeouts=TIMEOUTS)

    def save(self, family: str, layout: str, root: str) -> None:
        """By ours."""
        run = self._run(family, layout, SAVED)
        state = common_state(SAVED, Loader(SAVED)) | run.state
        with self._engine(root) as engine:
            engine.save(state, checkpoint_id=NAME).upload_completion.result(PATIENCE)

    def stock_save(self, family: str, layout: str, root: str) -> None:
        run = self._run(family, layout, SAVED)
        state = common_state(SAVED, None) | run.state
        dcp.save(state, checkpoint_id=f"{root}/{NAME}", no_dist=self._size == 1)

    def load(self, family: str, layout: str, root: str, saved_world: int | None) -> list[str]:
        """By ours; what is not as it was saved. ``saved_world`` is None where stock saved."""
        run = self._run(family, layout, BLANK)
        loader = Loader(BLANK)
        state = common_state(BLANK, None if saved_world is None else loader) | run.state
        with self._engine(root) as engine:
            engine.load(state, NAME)
        wrong = [] if saved_world is None else check_loader(loader, saved_world)
        return run.differences() + check_common(state) + wrong

    def stock_load(self, family: str, layout: str, root: str) -> list[str]:
        run = self._run(family, layout, BLANK)
        state = common_state(BLANK, None) | run.state
        dcp.load(state, checkpoint_id=f"{root}/{NAME}", no_dist=self._size == 1)
        return run.differences() + check_common(state)

    def read(self, family: str, root: str) -> list[str]:
        """What of the whole, as one process reads it, is not as it was saved."""
        with self._engine(root) as engine:
            state = engine.read(NAME)
        wrong = check_common(state)
        for name, tensor in whole(family).items():
            found = _lookup(state, name)
            if not same(found, tensor):
                wrong.append(f"{name} is {brief(found)}, not {brief(tensor)}")
        return shortened(wrong)

    def refuse_partial(self, root: str) -> str:
        """The error that refuses summands."""
        mesh = init_device_mesh("cpu", (self._size,))
        summand = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        return self._refused(root, {"model": {"fine": torch.ones(3), "summand": summand}})

    def refuse_sizes(self, root: str) -> str:
        """The error that refuses one name for tensors of two sizes."""
        return self._refused(root, {"model": {"odd": torch.ones(3 + self._rank), "fine": torch.ones(3)}})

    def _refused(self, root: str, state: dict[str, Any]) -> str:
        with self._engine(root) as engine:
            try:
                engine.save(state, checkpoint_id=NAME).upload_completion.result(PATIENCE)
            except SaveError as error:
                return f"{error.phase}: {error}"
        raise AssertionError("it was saved")

    def refuse_load(self, root: str) -> tuple[str, list[float]]:
        """The error that refuses a checkpoint of three names to two ranks that have one each, and what is in
        the target then."""
        target = torch.zeros(2)
        with self._engine(root) as engine:
            state = {"model": {name: torch.ones(2) for name in "abc"}}
            engine.save(state, checkpoint_id=NAME).upload_completion.result(PATIENCE)
            try:
                engine.load({"model": {"ab"[self._rank]: target}}, NAME)
            except IncompatibleStateError as error:
                return str(error), target.tolist()
        raise AssertionError("it was loaded")

    def save_replicated(self, root: str, count: int) -> int:
        """Many tensors, the same on all ranks; their bytes."""
        sizes = [(number * 2654435761 >> 7) % 30_000 for number in range(count)]
        state = {f"{at}": bits(f"{at}", (size,), torch.float32, SAVED) for at, size in enumerate(sizes)}
        with self._engine(root) as engine:
            engine.save({"model": state}, checkpoint_id=NAME).upload_completion.result(PATIENCE)
        return 4 * sum(sizes)

    def save_long(self, root: str, rows: int, columns: int) -> None:
        """One tensor, of which each row has its number in it."""
        tensor = torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, columns).contiguous()
        with self._engine(root) as engine:
            engine.save({"x": tensor}, checkpoint_id=NAME).upload_completion.result(PATIENCE)

    def load_long(self, root: str, rows: int, columns: int) -> tuple[int, bool]:
        """Load this rank's rows; the bytes that this process read, and whether they were right."""
        mesh = init_device_mesh("cpu", (self._size,))
        target = distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(0)], src_data_rank=None)
        with self._engine(root) as engine:
            before = _bytes_read()
            engine.load({"x": target}, NAME)
            nbytes = _bytes_read() - before
        mine = torch.arange(rows, dtype=torch.float32).chunk(self._size)[self._rank]
        return nbytes, bool((target.to_local() == mine[:, None]).all())


def _lookup(state: Any, name: str) -> Any:
    """What lies at a dotted name; keys may have dots themselves, or be numbers."""
    if not name:
        return state
    if isinstance(state, dict):
        for key, value in state.items():
            if f"{name}.".startswith(f"{key}."):
                found = _lookup(value, name[len(str(key)) + 1 :])
                if found is not None:
                    return found
    return None


def _bytes_read() -> int:
    """As the operating system counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def _serve(connection: Connection[Any, Any], rank: int, size: int, errors: str) -> None:
    """The process; its stderr goes to the file ``errors``."""
    descriptor = os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
    warnings.simplefilter("ignore")  # of torch's own deprecations
    torch.set_num_threads(1)
    if size > 1:
        port = 0 if rank == 0 else connection.recv()
        patience = datetime.timedelta(seconds=30)
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, patience, wait_for_workers=False)
        if rank == 0:
            connection.send(store.port)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    worker = Worker(rank, size)
    while (order := _received(connection)) is not None:
        verb, arguments = order
        method: Callable[..., Any] = getattr(worker, verb)
        try:
            answer = ("returned", method(**arguments))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        connection.send(answer)
    if size > 1:
        dist.destroy_process_group()


def _received(connection: Connection[Any, Any]) -> tuple[str, dict[str, Any]] | None:
    try:
        order: tuple[str, dict[str, Any]] | None = connection.recv()
    except EOFError:
        return None
    return order


class Team:
    """``size`` processes in one process group; one has none."""

    def __init__(self, size: int, folder: Path) -> None:
        self._connections: list[Connection[Any, Any]] = []
        self._processes: list[Any] = []
        self._errors = [folder / f"stderr-{size}-{rank}" for rank in range(size)]
        self.alive = True
        try:
            for rank in range(size):
                ours, theirs = CONTEXT.Pipe()
                arguments = (theirs, rank, size, str(self._errors[rank]))
                process = CONTEXT.Process(target=_serve, args=arguments)
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)
            if size > 1:
                port = self._answer(0, time.monotonic() + PATIENCE)
                for connection in self._connections[1:]:
                    connection.send(port)
        except BaseException:
            self.kill()
            raise

    def do(self, verb: str, **arguments: Any) -> list[Any]:
        """The answers, in the order of ranks. Raises CaseError, and then the team is over."""
        for connection in self._connections:
            connection.send((verb, arguments))
        deadline = time.monotonic() + PATIENCE
        try:
            answers = [self._answer(rank, deadline) for rank in range(len(self._processes))]
        except BaseException:
            self.kill()
            raise
        if raised := [f"rank {rank}: {text}" for rank, (how, text) in enumerate(answers) if how == "raised"]:
            self.kill()
            raise CaseError("\n".join(raised))
        return [value for _, value in answers]

    def _answer(self, rank: int, deadline: float) -> Any:
        connection = self._connections[rank]
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return connection.recv()
        except EOFError:
            raise CaseError(f"rank {rank} ended\n{self._said(rank)}") from None
        raise CaseError(f"rank {rank} did not answer in {PATIENCE:g} s\n{self._said(rank)}")

    def _said(self, rank: int) -> str:
        return self._errors[rank].read_text(errors="replace") if self._errors[rank].exists() else ""

    def kill(self) -> None:
        """SIGKILL to what is left, and reap."""
        self.alive = False
        for process in self._processes:
            process.kill()
            process.join(PATIENCE)
        for connection in self._connections:
            connection.close()

    def finish(self) -> None:
        """Ask all to end; kill those that do not."""
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.join(PATIENCE)
        self.kill()


class Teams:
    """A team of each size, made when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._teams: dict[int, Team] = {}

    def of(self, size: int) -> Team:
        team = self._teams.get(size)
        if team is None or not team.alive:
            team = self._teams[size] = Team(size, self._folder)
        return team

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for team in self._teams.values():
            if team.alive:
                team.finish()
