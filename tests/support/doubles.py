"""Fakes and comparisons shared by the suites: no mocks, no knowledge of how the engine is built.

What enters: a real storage, real states. What leaves: the same storage with faults at chosen calls,
and verdicts on bits, files and directories.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import struct
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine, Trust, sync

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB
ASIDE_BYTES = 8 * MIB  # what overlap=True sets aside from a budget for small tensors
PATIENCE = 100.0
"""Seconds; an upper bound on waiting for something that must happen, never a delay."""


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.complex32, torch.complex64, torch.complex128,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
]  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (3, 0, 5), (1, 1, 1), (3, 5), (2, 3, 4, 5), (129, 257)]

GATE_PATIENCE = 80.0
"""Seconds, less than PATIENCE: whoever holds a gate gives up before those who wait for it."""

# --- bits ---------------------------------------------------------------------------------------


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The element bytes in row-major order: NaN payloads and signed zeros count."""
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return b""
    return ctypes.string_at(flat.data_ptr(), flat.nbytes)


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """A tensor of random bytes, so that every bit pattern of the dtype occurs, NaNs included."""
    generator = torch.Generator().manual_seed(seed + 1)
    num_elements = math.prod(shape)
    if dtype is torch.bool:
        return torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.uint8).bool()
    itemsize = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (num_elements * itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(tuple(shape)) if num_elements else torch.empty(tuple(shape), dtype=dtype)


def difference(left: Any, right: Any, path: str = "") -> str | None:
    """The first place where two nested states differ bit for bit, or None."""
    where = path or "<root>"
    if isinstance(left, torch.Tensor) or isinstance(right, torch.Tensor):
        if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
            return f"{where}: {type(left).__name__} against {type(right).__name__}"
        if left.dtype != right.dtype or left.shape != right.shape:
            return f"{where}: {left.dtype} {tuple(left.shape)} against {right.dtype} {tuple(right.shape)}"
        if left.is_sparse:
            left, right = left.to_dense(), right.to_dense()
        return None if raw_bytes(left) == raw_bytes(right) else f"{where}: tensor bytes differ"
    if _is_array(left) and _is_array(right):
        same = left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
        return None if same else f"{where}: arrays differ"
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        left_keys = {(type(key), key) for key in left}
        right_keys = {(type(key), key) for key in right}
        if left_keys != right_keys:
            return f"{where}: keys differ: {sorted(map(repr, left_keys ^ right_keys))}"
        return _first(difference(left[key], right[key], f"{path}.{key}") for key in left)
    if type(left) is not type(right):
        return f"{where}: {type(left).__name__} against {type(right).__name__}"
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{where}: length {len(left)} against {len(right)}"
        return _first(
            difference(a, b, f"{path}.{index}") for index, (a, b) in enumerate(zip(left, right, strict=True))
        )
    if isinstance(left, float):
        return (
            None if struct.pack("d", left) == struct.pack("d", right) else f"{where}: {left} against {right}"
        )
    return None if left == right else f"{where}: {left!r} against {right!r}"


def _is_array(value: Any) -> bool:
    # not imported: the machines of tests/gpu may have torch without numpy
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def assert_same(left: Any, right: Any) -> None:
    text = difference(left, right)
    assert text is None, text


def frozen(value: Any) -> Any:
    """A deep copy of a state with each Stateful replaced by a copy of its state_dict."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if hasattr(value, "state_dict"):
        return frozen(value.state_dict())
    if _is_array(value):
        return value.copy()
    if isinstance(value, Mapping):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(frozen(item) for item in value)
    return value


def blank(value: Any) -> Any:
    """Targets of the same structure that hold other values: ones for tensors, None for leaves."""
    if isinstance(value, torch.Tensor):
        return torch.ones(value.shape, dtype=torch.uint8).to(value.dtype)
    if isinstance(value, Mapping):
        return {key: blank(item) for key, item in value.items()}
    if type(value) is list:
        return [blank(item) for item in value]
    return None


# --- a training run -----------------------------------------------------------------------------


class Net(nn.Module):
    """Small, but with everything that bites: a tie, BatchNorm's counters, dropout, a frozen buffer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, width)
        self.norm = nn.BatchNorm1d(width)
        self.hidden = nn.Linear(width, width)
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(width, 24, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.randn(5, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.hidden(self.norm(self.embed(tokens)))))
        output: torch.Tensor = self.head(hidden)
        return output


class TrainingRun:
    """Model, AdamW and a scheduler; each step draws its batch and its dropout from torch's generator."""

    def __init__(
        self,
        seed: int,
        *,
        width: int = 32,
        make_optim: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Net(width)
        self.optim = make_optim(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optim, T_max=50)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optim, "scheduler": self.scheduler}

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            tokens = torch.randint(0, 24, (16,))
            loss = nn.functional.cross_entropy(self.model(tokens), (tokens + 1) % 24)
            self.optim.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
            self.optim.step()
            self.scheduler.step()

    def picture(self) -> Any:
        return frozen(self.state)


# --- gates and faults ---------------------------------------------------------------------------


def _running_future() -> concurrent.futures.Future[None]:
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel the gate
    return future


class Gate:
    """Two futures that any thread and any loop can use: somebody arrived, and somebody may go on."""

    def __init__(self) -> None:
        self._arrived = _running_future()
        self._open = _running_future()
        self._lock = threading.Lock()

    def _finish(self, future: concurrent.futures.Future[None]) -> None:
        with self._lock:
            if not future.done():
                future.set_result(None)

    def release(self) -> None:
        self._finish(self._open)

    def arrived(self) -> bool:
        return self._arrived.done()

    def wait_arrived(self) -> None:
        self._arrived.result(PATIENCE)

    async def until_arrived(self) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self._arrived), PATIENCE)

    async def walk_through(self) -> None:
        """Raises TimeoutError when the test, stuck itself, does not open: a failure is better than a hang."""
        self._finish(self._arrived)
        await asyncio.wait_for(asyncio.wrap_future(self._open), GATE_PATIENCE)


LoopFactory = Callable[[], asyncio.AbstractEventLoop]
Rule = Callable[[str, tuple[Any, ...]], Awaitable[None]]


@dataclass
class _Fault:
    verb: str
    first: int
    times: float
    act: Rule
    seen: int = 0


@dataclass
class _Script:
    """What shall go wrong, shared by a storage and the transactions and readers it hands out."""

    faults: list[_Fault] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    async def enter(self, verb: str, args: tuple[Any, ...]) -> None:
        with self.lock:
            self.calls.append(verb)
            acting: list[_Fault] = []
            for fault in self.faults:
                if fault.verb == verb:
                    fault.seen += 1
                    if fault.first <= fault.seen < fault.first + fault.times:
                        acting.append(fault)
        for fault in acting:
            await fault.act(verb, args)


VERBS = frozenset(
    {
        "connect", "begin", "begin_shared", "list", "remove", "sweep", "open",
        "put", "seal", "fetch", "drop", "commit", "abort",
        "metadata", "manifest", "size", "read_into", "close",
    }
)  # fmt: skip
HANDS_OUT = frozenset({"begin", "begin_shared", "open"})  # their results are wrapped too


class _Wrapped:
    """Passes everything on to the real object, and stumbles where the script says so."""

    def __init__(self, inner: Any, script: _Script) -> None:
        self._inner = inner
        self._script = script

    def __repr__(self) -> str:
        return f"<faulty {self._inner!r}>"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name in VERBS and inspect.iscoroutinefunction(value):
            return self._verb(name, value)
        return value

    def _verb(self, name: str, real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            await self._script.enter(name, args)
            result = await real(*args, **kwargs)
            if name in HANDS_OUT and type(result).__module__.startswith("dcp_async"):
                return _Wrapped(result, self._script)
            return result

        return call


class FaultyStorage(_Wrapped):
    """A storage whose n-th call of a verb fails or waits; everything else is the real storage's doing.

    It owns nothing: the wrapped storage is closed by whoever made it.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner, _Script())

    @property
    def calls(self) -> list[str]:
        with self._script.lock:
            return list(self._script.calls)

    def fail(self, verb: str, error: BaseException, *, nth: int = 1, times: float = math.inf) -> None:
        """Raise `error` at the nth call of `verb` from now on, and at the `times - 1` that follow."""

        async def act(_verb: str, _args: tuple[Any, ...]) -> None:
            raise error

        self._add(_Fault(verb, nth, times, act))

    def fail_if(self, verb: str, error: BaseException, concerns: Callable[[tuple[Any, ...]], bool]) -> None:
        """Raise `error` at each call of `verb` whose arguments it `concerns`."""

        async def act(_verb: str, args: tuple[Any, ...]) -> None:
            if concerns(args):
                raise error

        self._add(_Fault(verb, 1, math.inf, act))

    @contextlib.contextmanager
    def hold(self, verb: str, *, nth: int = 1, times: float = math.inf) -> Iterator[Gate]:
        """Keep the nth call of `verb` and all later ones waiting at the gate; leaving releases it."""
        gate = Gate()

        async def act(_verb: str, _args: tuple[Any, ...]) -> None:
            await gate.walk_through()

        self._add(_Fault(verb, nth, times, act))
        try:
            yield gate
        finally:
            gate.release()

    @contextlib.contextmanager
    def fail_late(self, verb: str, error: BaseException) -> Iterator[Gate]:
        """Like hold, but each call that was held fails: so save() has returned before anything went wrong."""
        with self.hold(verb) as gate:
            self.fail(verb, error)
            yield gate

    def heal(self) -> None:
        with self._script.lock:
            self._script.faults.clear()

    def _add(self, fault: _Fault) -> None:
        assert fault.verb in VERBS, fault.verb
        with self._script.lock:
            self._script.faults.append(fault)


@contextlib.asynccontextmanager
async def faulty_storage(root: Path) -> AsyncIterator[FaultyStorage]:
    """The local storage below `root`, ready to be told what shall go wrong; closed at the end."""
    from dcp_async.storage.local.storage import LocalStorage

    storage = LocalStorage(root)
    try:
        yield FaultyStorage(storage)
    finally:
        await storage.close()


class SteppingLoop(asyncio.SelectorEventLoop):
    """Calls back once, on the loop's own thread, before its k-th turn after `arm`."""

    def __init__(self) -> None:
        super().__init__()
        self._countdown: int | None = None
        self._callback: Callable[[], None] | None = None
        self._arming = threading.Lock()

    def arm(self, turns: int, callback: Callable[[], None]) -> None:
        with self._arming:
            self._countdown, self._callback = turns, callback

    def disarm(self) -> bool:
        """True when the callback has not been called."""
        with self._arming:
            unused, self._callback, self._countdown = self._callback is not None, None, None
            return unused

    def _run_once(self) -> None:
        callback: Callable[[], None] | None = None
        with self._arming:
            if self._countdown is not None:
                self._countdown -= 1
                if self._countdown <= 0:
                    callback, self._callback, self._countdown = self._callback, None, None
        if callback is not None:
            callback()
        super()._run_once()  # type: ignore[misc]  # private, and the only place where a turn begins


class LoopSpy:
    """The loops that engines asked for, so that a test can look at them after the engine is gone."""

    def __init__(self, factory: LoopFactory) -> None:
        self.factory = factory
        self.loops: list[asyncio.AbstractEventLoop] = []
        self._threads = set(threading.enumerate())

    def new(self) -> asyncio.AbstractEventLoop:
        loop = self.factory()
        self.loops.append(loop)
        return loop

    def assert_closed(self) -> None:
        """Once the threads that came with the engines have ended, their loops are closed."""
        for thread in threading.enumerate():
            if thread not in self._threads:
                thread.join(PATIENCE)
        assert all(loop.is_closed() for loop in self.loops)


def replace_loops(monkeypatch: pytest.MonkeyPatch, factory: LoopFactory) -> LoopSpy:
    """From here on engines run on loops of this factory."""
    import dcp_async._concurrency.loop_thread as concurrency

    spy = LoopSpy(factory)
    monkeypatch.setattr(concurrency, "default_loop_factory", lambda: spy.new)
    return spy


class EventLog:
    """An Observer that keeps what it was told, and on which thread."""

    def __init__(self, react: Callable[[Any], None] | None = None) -> None:
        self.events: list[Any] = []
        self.threads: set[int] = set()
        self._react = react

    def on_event(self, event: Any) -> None:
        self.events.append(event)
        self.threads.add(threading.get_ident())
        if self._react is not None:
            self._react(event)

    def named(self, kind: str) -> list[Any]:
        return [event for event in self.events if type(event).__name__ == kind]

    def order(self) -> list[tuple[str, Any]]:
        return [(type(event).__name__, event.checkpoint_id) for event in self.events]


async def on_thread(work: Callable[[], T], name: str = "test-helper") -> T:
    """Run `work` on a thread that is gone when this returns (an executor's thread would look leaked)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(setter: Callable[..., None], value: Any) -> None:
        if not future.done():
            setter(value)

    def body() -> None:
        try:
            result = work()
        except BaseException as error:
            loop.call_soon_threadsafe(deliver, future.set_exception, error)
            if not isinstance(error, Exception):
                raise
        else:
            loop.call_soon_threadsafe(deliver, future.set_result, result)

    thread = threading.Thread(target=body, name=name, daemon=True)
    thread.start()
    try:
        return await asyncio.wait_for(future, PATIENCE)
    finally:
        thread.join(PATIENCE if future.done() else 0)


# --- errors -------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> list[BaseException]:
    """The error with its causes, contexts and group members, each once."""
    found: list[BaseException] = []
    todo = [error]
    while todo:
        current = todo.pop()
        if current is None or any(current is seen for seen in found):
            continue
        found.append(current)
        todo += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            todo += list(current.exceptions)
    return found


# --- directories --------------------------------------------------------------------------------

DATA_FILE = re.compile(r"^__\d+_\d+-(?P<uid>[0-9a-f]{16})\.distcp$")
MANIFEST = re.compile(r"^manifest-(?P<uid>[0-9a-f]{16})\.json$")
BLOCK_BYTES = 256 * KIB
UID_BYTES = 8


def committed(root: Path) -> list[str]:
    """The names of the checkpoints that exist, by the one rule there is: `.metadata` does."""
    return sorted(path.parent.name for path in root.glob("*/.metadata"))


def data_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.distcp"))


def manifest_file(directory: Path) -> Path:
    (path,) = directory.glob("manifest-*.json")
    return path


def manifest_of(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(manifest_file(directory).read_text())
    return value


def leftovers(root: Path) -> list[str]:
    """Everything below the root that no committed checkpoint needs."""
    found: list[str] = []
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        if not entry.is_dir():
            found.append(entry.name)
            continue
        names = sorted(os.listdir(entry))
        if ".metadata" not in names:
            found += [f"{entry.name}/{name}" for name in names] or [f"{entry.name}/"]
            continue
        uids = set()
        for name in names:
            match = DATA_FILE.match(name) or MANIFEST.match(name)
            if match:
                uids.add(match["uid"])
            elif name != ".metadata":
                found.append(f"{entry.name}/{name}")
        if len(uids) > 1:
            found.append(f"{entry.name}: files of several saves {sorted(uids)}")
    return found


def whole_steps(root: Path) -> list[int | None]:
    """The steps of what is committed, all of which must be whole."""
    with sync.CheckpointEngine(root) as engine:
        infos = list(engine.checkpoints())
        names = {path.parent.name for path in root.glob("*/.metadata")}
        assert {info.checkpoint_id for info in infos} == names, "what is committed is not whole"
        assert all(engine.verify(info).ok for info in infos)
    return [info.step for info in infos]


def assert_holds_only(root: Path, names: Sequence[str]) -> None:
    assert committed(root) == sorted(names)
    assert leftovers(root) == []


def flip(path: Path, position: int, mask: int = 0x20) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ mask]))


def mapped_arena_bytes() -> int:
    """Bytes of arenas mapped into this process: the pool, seen from outside."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("/dev/zero"):
            low, high = line.split(" ", 1)[0].split("-")
            total += int(high, 16) - int(low, 16)
    return total


def open_descriptors() -> dict[int, str]:
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


async def written_unchecked(root: Path, *states: Mapping[str, Any], first: int = 1) -> None:
    """Saves as an engine does that trusts everything, as steps 1, 2, ...: what others must then refuse."""
    async with CheckpointEngine(root, trust=Trust(unsafe=True)) as engine:
        for step, state in enumerate(states, first):
            await (await engine.save(state, step=step)).upload_completion
