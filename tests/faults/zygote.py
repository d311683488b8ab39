"""A process that has imported everything, opened nothing and started no thread, and forks one child per job.

In: orders on a Unix socket, each with three descriptors (report pipe, gate pipe, stderr file). Out: the pid,
later the exit status. Importing torch takes seconds and a crash sweep needs hundreds of processes; a child
forked from here differs from a fresh interpreter in nothing that the package under test can see. `--job` runs
one job without the fork.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import Any

from tests.faults import calls

TAP = calls.CallTap()
TAP.install()

from tests.faults import jobs  # noqa: E402 - after the tap, so that no module keeps an untapped function


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job: its name, its arguments and its pipes."""

    job: str
    args: dict[str, Any]
    report: int
    gate: int


def serve(control: socket.socket) -> Order | None:
    """Returns None in the server when the other side hangs up, an order in each child."""
    alive: set[int] = set()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 65536, 3)
        if not message:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return None
        request = json.loads(message)
        if request["verb"] == "reap":
            alive.discard(request["pid"])
            _, status = os.waitpid(request["pid"], 0)
            control.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
            continue
        report, gate, errors = fds
        pid = os.fork()
        if pid == 0:
            control.close()
            os.dup2(errors, 2)
            os.close(errors)
            return Order(job=request["job"], args=request["args"], report=report, gate=gate)
        alive.add(pid)
        for fd in fds:
            os.close(fd)
        control.sendall(json.dumps({"pid": pid}).encode() + b"\n")


if __name__ == "__main__":
    if sys.argv[1] == "--job":
        order: Order | None = Order(**json.loads(sys.argv[2]))
    else:
        connection = socket.socket(fileno=int(sys.argv[2]))
        jobs.warm_up()
        # Otherwise each child's collections and its end copy every page of what was imported.
        gc.freeze()
        order = serve(connection)
    # A child comes out of serve() with its order and ends as any script does: off the end of the module.
    if order is not None:
        # A test runner in the background may have SIGINT ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        line = jobs.Line(order.report, order.gate)
        job = jobs.JOBS[order.job]
        job(jobs.Context(line=line, tap=TAP), **order.args)
        if job not in jobs.ENDING:
            # Taking the interpreter down costs a child more than most jobs do.
            os._exit(0)
