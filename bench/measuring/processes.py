"""The parent's side of the processes that are measured: start them, ask them in turn, end them.

In: which engines over which workload. Out: every sample, by engine and figure, in order of taking.
Keeps: one process is asked at a time; the samples of one round lie close together in time; an engine that
fails is left out from then on, with its reason in `failures`, and never silently.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""What holds this bench and the package beside it."""
ANSWER_SECONDS = 300.0
"""After this long without an answer a process is killed: far above the slowest sample."""
RANKS_SECONDS = 600.0
"""After this long the ranks of one point are killed."""
WRONG_BITS = "what was loaded differs from what was saved"
PATH_LIKE = re.compile(r"(?<![\w.])(?:file:/+)?/[\w.+-]+(?:/[\w.+-]*)+")


class WorkerError(Exception):
    """A process answered with a traceback, or died; the text says which."""


def progress(text: str) -> None:
    """One line for whoever watches."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def command(module: str, argument: Mapping[str, Any]) -> list[str]:
    """Runs a module of this folder, which reads the argument as JSON."""
    # -P: the working directory must not come before what the environment names.
    return [sys.executable, "-P", "-m", f"bench.measuring.{module}", json.dumps(argument)]


def environment(tree: Path = ROOT) -> dict[str, str]:
    """Leads a process to the package in `tree`, whatever is installed, and to this bench."""
    paths = [str(tree), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # gloo must not go looking for a network.
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}


class Child:
    """The process of one engine; closes it, and never touches another."""

    def __init__(
        self,
        engine: str,
        workload: str,
        scale: float,
        directory: Path,
        *,
        label: str | None = None,
        tree: Path = ROOT,
        device: str | None = None,
        patience: float = ANSWER_SECONDS,
    ) -> None:
        """``label`` is what its samples are kept under, by default ``engine``.

        ``tree`` holds the package, and no bench but this one. ``device`` is where the state lies, and the
        commands are those of devices then; None is the host. After ``patience`` seconds without an answer
        the process is killed.
        """
        self.engine = label or engine
        self._patience = patience
        root = directory / self.engine.replace(" ", "-")
        root.mkdir(parents=True)
        self._log = root.with_suffix(".log")
        arguments = {
            "engine": engine,
            "workload": workload,
            "scale": scale,
            "device": device,
            "root": str(root),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command("worker", arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(tree),
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

    def dismiss(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Let the process end, and end it when it does not."""
        self.dismiss()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(self._patience, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise WorkerError(f"{tail}\nthe process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


@dataclass(slots=True)
class Group:
    """Engines that are measured in turn, and what they gave."""

    children: list[Child]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def take(
        self, command: str, *, prefix: str = "", rotate: int = 0, only: Sequence[str], **keywords: Any
    ) -> None:
        """One sample of each of these engines in turn, starting `rotate` places further."""
        children = [child for child in self.children if child.engine in only]
        shift = rotate % max(1, len(children))
        for child in children[shift:] + children[:shift]:
            start = time.perf_counter()
            try:
                answer = child.ask(command, **keywords)
            except (WorkerError, BrokenPipeError) as error:
                self.fail(child.engine, str(error))
                continue
            figures = self.samples.setdefault(child.engine, {})
            for name, value in answer.items():
                figures.setdefault(prefix + name, []).append(value)
            shown = " ".join(
                f"{k}={v:.3f}" for k, v in answer.items() if isinstance(v, float) and "bytes" not in k
            )
            seconds = time.perf_counter() - start
            progress(f"  {prefix}{command:13} {child.engine:18} {shown} ({seconds:.1f} s)")

    def engines(self, *, but: Sequence[str] = ()) -> list[str]:
        """The engines still in the run."""
        return [child.engine for child in self.children if child.engine not in but]

    def take_loads(self, rotate: int, *, only: Sequence[str]) -> None:
        """One load with a cold cache and one with a warm one of each of these engines."""
        for cold in (True, False):
            self.take("load", rotate=rotate, only=only, cold=cold)

    def fail_wrong(self) -> None:
        """Leave out every engine that loaded other bits than it had saved."""
        for engine, figures in list(self.samples.items()):
            if different := sum(figures.get("num_different", ())):
                self.fail(engine, f"{WRONG_BITS}: {different} tensors of all loads")

    def fail(self, engine: str, reason: str) -> None:
        """Leave an engine out from here on, and say why."""
        self.failures[engine] = short_reason(reason)
        progress(f"  FAILED {engine}: {self.failures[engine]}")
        progress("    " + reason.strip().replace("\n", "\n    "))
        for child in self.children:
            if child.engine == engine:
                child.close()
        self.children = [child for child in self.children if child.engine != engine]


def short_reason(text: str) -> str:
    """The last line that says something, without the machine's paths."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip(" -^~|=")]
    last = lines[-1] if lines else "?"
    return PATH_LIKE.sub(lambda match: match[0].rstrip("/").rpartition("/")[2], last)[:300]


@contextmanager
def running(children: Iterable[Child]) -> Iterator[Group]:
    """The engines' processes, ready to be asked; ended on the way out."""
    group = Group([])
    try:
        # All at once: most of a start is importing torch, and nothing is timed yet.
        for child in children:
            group.children.append(child)
        for child in list(group.children):
            try:
                group.facts[child.engine] = child.ready()
            except WorkerError as error:
                group.fail(child.engine, str(error))
        yield group
    finally:
        for child in group.children:
            child.dismiss()
        for child in group.children:
            child.close()


def run_ranks(module: str, num_ranks: int, given: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The samples of that many ranks: processes of a module of this folder, which meet on the loopback.

    Raises: WorkerError when one fails, or takes longer than `RANKS_SECONDS`.
    """
    directory.mkdir(parents=True)
    answer, log = directory / "samples.json", directory / "ranks.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    arguments = command(module, {**given, "root": str(directory), "answer": str(answer)})
    with log.open("wb") as output:
        processes = [
            subprocess.Popen(
                arguments, env={**environment(), **meeting, "RANK": str(rank)}, stdout=output, stderr=output
            )
            for rank in range(num_ranks)
        ]
    try:
        statuses = [process.wait(RANKS_SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        statuses = [-1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(statuses):
        raise WorkerError(log.read_text(encoding="utf-8", errors="replace"))
    samples: dict[str, Any] = json.loads(answer.read_text(encoding="ascii"))
    return samples
