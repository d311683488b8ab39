"""Fresh processes that need not import torch: each is forked from a server that has imported everything, and
has opened nothing and started no thread.

In: functions and their arguments, which are pickled. Out: what they return, or a failure with what they
wrote. Importing torch takes two seconds of a processor, forking a few milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",  # of which the modules that define the functions have need
        "tests.buckets.agent",
        "tests.distributed.agent",
        "tests.distributed.engine_agent",
        "tests.distributed.matrix_worker",
        "tests.distributed.replica_agent",
        "tests.interop.rank_jobs",
        "tests.support.tensor_kinds",
        "tests.support.training_jobs",
        "tests.support.wrapped_tensors",
    ]
)
"""For all, since there is one server a test run: what is not named here, each process imports anew."""

PATIENCE = 110.0
"""Seconds that a process may take; far above what a healthy one needs."""

Job = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function of a module, and its arguments."""


def run_in_process(function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> Any:
    """What ``function`` returns in a process of its own, which ends well."""
    return run_in_processes([(function, arguments)], patience)[0]


def run_in_processes(jobs: Sequence[Job], patience: float = PATIENCE) -> list[Any]:
    """What each of ``jobs`` returns, all of them at once, each in a process of its own, which ends well."""
    with tempfile.TemporaryDirectory() as scratch:
        outputs = [Path(scratch, str(number)) for number in range(len(jobs))]
        processes, answers = [], []
        try:
            for (function, arguments), output in zip(jobs, outputs, strict=True):
                answer, theirs = CONTEXT.Pipe(duplex=False)
                process = CONTEXT.Process(target=_main, args=(theirs, str(output), function, arguments))
                process.start()
                theirs.close()
                processes.append(process)
                answers.append(answer)
            deadline = time.monotonic() + patience
            pickled = [_received(answer, deadline) for answer in answers]
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process, answer in zip(processes, answers, strict=True):
                process.kill()
                process.join()
                answer.close()
        said = "\n".join(output.read_text(errors="replace")[-4000:] for output in outputs if output.exists())
        assert [process.exitcode for process in processes] == [0] * len(jobs), said
        return [pickle.loads(raw) for raw in pickled]


def _received(answer: Connection[Any, Any], deadline: float) -> bytes:
    """Nothing, if the process has ended without one or takes too long."""
    try:
        return answer.recv_bytes() if answer.poll(max(0.0, deadline - time.monotonic())) else b""
    except EOFError:
        return b""


def _main(answer: Connection[Any, Any], output: str, function: Callable[..., Any], arguments: Any) -> None:
    """The process; what it writes goes to the file ``output``."""
    descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    warnings.simplefilter("ignore")  # of torch's own deprecations
    torch.set_num_threads(1)
    # not answer.send(), whose pickler shares the memory of tensors with a process that is about to end
    answer.send_bytes(pickle.dumps(function(*arguments)))
