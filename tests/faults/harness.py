"""Starts the jobs of this folder as processes of their own, talks to them, and ends each by its pid.

Out: `Nursery.start(job, ...) -> Child`. A child reports JSON lines on a pipe and takes tokens from a gate
pipe. Every wait has a deadline; a child that misses it dumps the stacks of all its threads into the failure
message.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 60.0
"""Seconds that any one wait for a child may take; far above what a healthy one needs."""
Report = dict[str, Any]


class Child:
    """One running job. The nursery kills and reaps it in the end."""

    def __init__(self, nursery: Nursery, pid: int, report: int, gate: int, errors: Path, what: str) -> None:
        self.pid = pid
        self.what = what
        self.heard: list[Report] = []
        self.status: int | None = None
        self._nursery = nursery
        self._pidfd = os.pidfd_open(pid)
        self._report, self._gate, self._errors = report, gate, errors
        self._rest = b""
        self._pending: list[Report] = []

    def __repr__(self) -> str:
        return f"Child({self.what}, pid={self.pid}, status={self.status})"

    def stderr(self) -> str:
        return self._errors.read_text(errors="replace")

    def next(self, *, patience: float = PATIENCE) -> Report | None:
        """The next report, None when the child has closed its pipe."""
        deadline = time.monotonic() + patience
        while not self._pending:
            if not _readable(self._report, deadline):
                self._fail(f"said nothing for {patience:g} s")
            data = os.read(self._report, 1 << 16)
            if not data:
                return None
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._pending += [json.loads(line) for line in lines]
        report = self._pending.pop(0)
        self.heard.append(report)
        return report

    def expect(self, kind: str, *, patience: float = PATIENCE) -> Report:
        """Reads on to the next report of this kind; fails when the child ends before."""
        while (report := self.next(patience=patience)) is not None:
            if report["kind"] == kind:
                return report
        self.wait()
        raise AssertionError(f"{self!r} ended without {kind!r}; it said {self.heard[-8:]}\n{self.stderr()}")

    def rest(self, *, patience: float = PATIENCE) -> list[Report]:
        """All reports to the end of the pipe."""
        while self.next(patience=patience) is not None:
            pass
        return self.heard

    def silent(self, *, within: float) -> bool:
        """Whether nothing (not even the end of the pipe) comes for so many seconds."""
        return not self._pending and not _readable(self._report, time.monotonic() + within)

    def said(self, kind: str) -> list[Report]:
        return [report for report in self.heard if report["kind"] == kind]

    def grant(self, tokens: int = 1) -> None:
        os.write(self._gate, b"." * tokens)

    def open_gate(self) -> None:
        """From here on every wait at the gate passes."""
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL, then waits for the end."""
        if self.status is None:
            self.signal(signal.SIGKILL)
            self.wait()

    def ended(self, *, within: float) -> bool:
        return self.status is not None or _readable(self._pidfd, time.monotonic() + within)

    def wait(self, *, patience: float = PATIENCE) -> int:
        """The exit status, negative for a signal; fails when the child hangs."""
        if self.status is None:
            if not self.ended(within=patience):
                self._fail(f"did not end within {patience:g} s")
            self.status = self._nursery.reap(self.pid)
        return self.status

    def finish(self, *, patience: float = PATIENCE) -> list[Report]:
        """Waits for a healthy end (status 0) and gives all reports."""
        heard = self.rest(patience=patience)
        status = self.wait(patience=patience)
        assert status == 0, f"{self!r} ended with {status}\n{self.stderr()}"
        return heard

    def release(self) -> None:
        self.kill()
        self.open_gate()
        os.close(self._report)
        os.close(self._pidfd)

    def _fail(self, why: str) -> None:
        stacks = ""
        if not self.ended(within=0):
            self.signal(signal.SIGUSR1)
            self.ended(within=1.0)
            stacks = self.stderr()
            self.kill()
        raise AssertionError(f"{self!r} {why}; it said {self.heard[-8:]}\n{stacks or self.stderr()}")


class Nursery:
    """Owns the zygote process and all its children."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._children: list[Child] = []
        self._born = 0
        self._direct: dict[int, subprocess.Popen[bytes]] = {}
        ours, theirs = socket.socketpair()
        self._control = ours
        self._errors = scratch / "zygote.stderr"
        with self._errors.open("wb") as errors, theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.faults.zygote", "--serve", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=errors,
                env=_environment(),
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def start(self, job: str, /, **args: object) -> Child:
        """Forks a child of the zygote that runs `jobs.JOBS[job]` and ends as a script ends."""
        with self._pipes() as (report, gate, ours, errors):
            with errors.open("wb") as sink:
                order = json.dumps({"verb": "start", "job": job, "args": args}, default=str).encode()
                socket.send_fds(self._control, [order], [report, gate, sink.fileno()])
            pid = self._answer()["pid"]
            return self._adopt(Child(self, pid, *ours, errors, job))

    def start_script(self, job: str, /, **args: object) -> Child:
        """The same in a new interpreter: seconds slower, nothing shared."""
        with self._pipes() as (report, gate, ours, errors):
            order = json.dumps({"job": job, "args": args, "report": report, "gate": gate}, default=str)
            with errors.open("wb") as sink:
                process = subprocess.Popen(
                    [sys.executable, "-u", "-m", "tests.faults.zygote", "--job", order],
                    pass_fds=[report, gate],
                    stdin=subprocess.DEVNULL,
                    stderr=sink,
                    env=_environment(),
                    cwd=REPOSITORY,
                    start_new_session=True,
                )
            self._direct[process.pid] = process
            return self._adopt(Child(self, process.pid, *ours, errors, job))

    def run(self, job: str, /, **args: object) -> Report:
        """Runs a job to its healthy end and gives its last report."""
        child = self.start(job, **args)
        heard = child.finish()
        self.forget(child)
        return heard[-1] if heard else {}

    def reap(self, pid: int) -> int:
        if pid in self._direct:
            return self._direct.pop(pid).wait()
        self._control.sendall(json.dumps({"verb": "reap", "pid": pid}).encode())
        return int(self._answer()["status"])

    def forget(self, child: Child) -> None:
        """Kills the child if it lives and closes its pipes."""
        child.release()
        self._children.remove(child)

    def end_children(self) -> None:
        for child in list(self._children):
            self.forget(child)

    def close(self) -> None:
        self.end_children()
        self._control.close()
        self._zygote.wait(PATIENCE)

    def _adopt(self, child: Child) -> Child:
        self._children.append(child)
        return child

    @contextmanager
    def _pipes(self) -> Iterator[tuple[int, int, tuple[int, int], Path]]:
        heard, report = os.pipe()
        gate, token = os.pipe()
        self._born += 1
        errors = self._scratch / f"child-{self._born}.stderr"
        try:
            yield report, gate, (heard, token), errors
        except BaseException:
            os.close(heard)
            os.close(token)
            raise
        finally:
            os.close(report)
            os.close(gate)

    def _answer(self) -> Report:
        data = b""
        while not data.endswith(b"\n"):
            if not _readable(self._control.fileno(), time.monotonic() + PATIENCE):
                raise AssertionError("the zygote does not answer")
            piece = self._control.recv(65536)
            if not piece:
                self._zygote.wait(PATIENCE)
                raise AssertionError(f"the zygote has ended:\n{self._errors.read_text(errors='replace')}")
            data += piece
        answer: Report = json.loads(data)
        return answer


def _readable(fd: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _environment() -> dict[str, str]:
    path = [
        str(REPOSITORY),
        *(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry),
    ]
    # One thread, and the same kernels whatever the alignment: bits must not depend on the process.
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "AUTO,STRICT"}
    return {**os.environ, **single, "PYTHONPATH": os.pathsep.join(path)}
