"""The parent's side of the engines' processes: start them, ask them in turn, end them.

In: which engines over which workload. Out: every sample, by engine and figure, in order of taking.
Keeps: one process is asked at a time; the samples of one round lie close together in time; an engine that
fails is left out from then on, with its traceback in `failures`, and never silently.
Belongs here: processes, rounds, groups that fit into memory. Not here: what a figure is, how it is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER_SECONDS = 1200.0
"""After this long without an answer a process is killed: far above the slowest sample."""
STATE_BYTES = {"large": 64 << 24, "llm": 2_298_876_480, "many": 20_000 << 12}
"""The workloads and their sizes at scale 1, known here without building them."""
PROCESS_BYTES = 400 << 20
STATES_HELD = {
    "raw": 2.0,
    "dcp_async": 2.0,
    "dcp_async overlap": 2.0,
    "dcp_async 128 MiB": 1.15,
    "stock": 2.0,
    "stock best": 2.0,
    "stock best overlap": 2.0,
    "stock sync": 1.1,
}
"""How many times the state a process may hold at its peak, source included."""


class WorkerError(Exception):
    """A process answered with a traceback, or died; the text says which."""


def progress(text: str) -> None:
    """One line for whoever watches."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Child:
    """The process of one engine; closes it, and never touches another."""

    def __init__(self, engine: str, workload: str, scale: float, directory: Path) -> None:
        self.engine = engine
        root = directory / engine.replace(" ", "-")
        root.mkdir(parents=True)
        self._log = root.with_suffix(".log")
        arguments = {"engine": engine, "workload": workload, "scale": scale, "root": str(root)}
        # The package of this tree is measured, installed or not; gloo must not go looking for a network.
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "worker.py"), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def ready(self) -> dict[str, Any]:
        """Wait until state and engine stand; what the process says about itself."""
        return self._answer()

    def ask(self, command: str, **keywords: Any) -> dict[str, Any]:
        """One sample."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command, **keywords}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let the process end, and end it when it does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(ANSWER_SECONDS, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise WorkerError(f"{self.engine}: ended with status {self._process.wait()}\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.engine}: {answer['error']}")
        return answer


@dataclass(slots=True)
class Group:
    """Engines that are measured in turn, and what they gave."""

    children: list[Child]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def take(
        self, command: str, *, prefix: str = "", rotate: int = 0, only: Sequence[str] = (), **keywords: Any
    ) -> None:
        """One sample of each engine in turn, starting `rotate` places further."""
        children = [child for child in self.children if not only or child.engine in only]
        shift = rotate % max(1, len(children))
        for child in children[shift:] + children[:shift]:
            start = time.perf_counter()
            try:
                answer = child.ask(command, **keywords)
            except (WorkerError, BrokenPipeError) as error:
                self._fail(child, error)
                continue
            figures = self.samples.setdefault(child.engine, defaultdict(list))
            for name, value in answer.items():
                figures[prefix + name].append(value)
            shown = " ".join(
                f"{k}={v:.3f}" for k, v in answer.items() if isinstance(v, float) and "bytes" not in k
            )
            progress(
                f"  {prefix}{command:13} {child.engine:18} {shown} ({time.perf_counter() - start:.1f} s)"
            )

    def engines(self, *, but: Sequence[str] = ()) -> list[str]:
        """The engines still in the run."""
        return [child.engine for child in self.children if child.engine not in but]

    def _fail(self, child: Child, error: Exception) -> None:
        progress(f"  FAILED {child.engine}: {str(error).strip().splitlines()[-1]}")
        self.failures[child.engine] = str(error)
        self.children = [other for other in self.children if other is not child]
        child.close()


@contextmanager
def running(engines: Sequence[str], workload: str, scale: float, directory: Path) -> Iterator[Group]:
    """The engines' processes, ready to be asked; ended on the way out."""
    group = Group([])
    try:
        for engine in engines:
            child = Child(engine, workload, scale, directory)
            group.children.append(child)
            try:
                group.facts[engine] = child.ready()
            except WorkerError as error:
                group._fail(child, error)
        yield group
    finally:
        for child in group.children:
            child.close()


def memory_needed(engines: Sequence[str], state_bytes: int) -> int:
    """Bytes that these processes may hold together."""
    return sum(PROCESS_BYTES + int(STATES_HELD[engine] * state_bytes) for engine in engines)


def memory_available() -> int:
    """What the kernel says can be had without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable: these benches need Linux")


def groups_that_fit(core: Sequence[str], others: Sequence[str], state_bytes: int) -> list[list[str]]:
    """Who is measured side by side: the core together, then as many others a group as fit into memory.

    Raw begins each group, since no ratio leaves a group.
    """
    room = int(memory_available() * 0.85)
    groups = [list(core)]
    for engine in others:
        if memory_needed([*groups[-1], engine], state_bytes) > room:
            groups.append(["raw"])
        groups[-1].append(engine)
    for group in groups:
        if (needed := memory_needed(group, state_bytes)) > room:
            raise SystemExit(
                f"{' + '.join(group)} need {needed / 1e9:.1f} GB of memory, {room / 1e9:.1f} GB can be used: "
                "give a smaller --scale or other --workloads"
            )
    return groups
