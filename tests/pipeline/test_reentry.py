"""A thread that is inside of a verb and calls another one is told at once; nothing ever waits for itself.

Signal handlers are run for real where the moment can be chosen, and by a trace function, which runs in the
thread between two bytecodes just as a handler does, where it can't.
"""

from __future__ import annotations

import asyncio
import itertools
import linecache
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import dcp_async
from dcp_async import CheckpointEngine, EngineStateError, Limits, SaveError, StagingOptions, sync
from tests.support.doubles import (
    PATIENCE,
    EventLog,
    FaultyStorage,
    assert_same,
    committed,
    random_tensor,
)
from tests.support.saves import PART, STATE

PACKAGE = str(Path(dcp_async.__file__).parent)
WIDE = {"w": random_tensor(torch.uint8, (20 * PART,), 2)}
OURS = (
    "engine/engine",
    "engine/verbs",
    "sync/engine",
    "_concurrency/verbs",
    "engine/admission",
    "engine/lifetime",
    "response",
    "engine/saves",
    "engine/loads",
    "engine/optimizer_hooks",
    "_concurrency/signal_safe",
    "_concurrency/waiting",
)
HANG = 300.0
"""No deadline that a test has to meet: after that it hangs, also on a busy machine that syncs slowly."""

pytestmark = pytest.mark.timeout(HANG + 60)


class Between:
    """Calls ``handler`` in the traced thread before every ``stride``-th bytecode of ours."""

    def __init__(self, stride: int, handler: Callable[[], object], modules: tuple[str, ...] = OURS) -> None:
        self.calls = 0
        self._stride, self._handler = stride, handler
        self._files = {f"{PACKAGE}/{name}.py" for name in modules}
        assert all(Path(name).exists() for name in self._files), "what is to be interrupted was moved"
        self._seen = 0

    def __enter__(self) -> Between:
        # before settrace(), which in CPython 3.12 looks once whether any frame wants opcodes
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._seen += 1
            if self._seen % self._stride == 0:
                self.calls += 1
                self._handler()
        return self._trace


def in_thread(work: Callable[[], object]) -> None:
    """Run ``work`` in a thread that may hang without hanging the tests."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(HANG)
    assert not thread.is_alive(), "it waits for itself"
    if errors:
        raise errors[0]


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(EngineStateError, match="inside of"):
        call()


@pytest.mark.parametrize("inner", ["save", "latest", "wait", "close", "read", "load", "look"])
def test_a_handler_between_any_two_bytecodes_of_a_save_is_answered_at_once(root: Path, inner: str) -> None:
    with sync.CheckpointEngine(root, limits=Limits(pending_saves=2)) as engine:
        earlier = engine.save(STATE, step=1)
        earlier.upload_completion.result(PATIENCE)

        def look() -> None:
            for response in (*engine.pending, earlier):
                response.upload_completion.done()
                response.upload_completion.add_done_callback(lambda _: None)
            earlier.cancel()
            earlier.upload_completion.result(0)

        calls: dict[str, Callable[[], object]] = {
            "save": lambda: refused(lambda: engine.save(STATE)),
            "latest": lambda: refused(engine.latest),
            "wait": lambda: refused(engine.wait),
            "close": lambda: refused(engine.close),
            "read": lambda: refused(engine.read),
            "load": lambda: refused(lambda: engine.load({"n": 0})),
            "look": look,
        }

        def save() -> None:
            verb = engine._life.inside

            def handler() -> None:
                if verb._verbs or inner == "look":  # before and after, save() is nobody's business
                    calls[inner]()

            with Between(5, handler) as between:
                engine.save(STATE, step=2)
            assert between.calls > 50

        in_thread(save)
        engine.wait()
        assert_same(engine.read(2), STATE)


@pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])
@pytest.mark.parametrize("handle", ["staging_completion", "upload_completion"])
def test_a_handler_within_a_save_may_wait_for_it_or_is_told_that_it_would_for_ever(
    root: Path, handle: str, overlap: bool
) -> None:
    refusals: list[EngineStateError] = []
    with sync.CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:

        def handler() -> None:
            for response in engine.pending:
                try:
                    getattr(response, handle).result(PATIENCE)
                except EngineStateError as error:
                    refusals.append(error)

        def save() -> None:
            with Between(1, handler, modules=(*OURS, "save/request")):
                engine.save(STATE, step=1)

        in_thread(save)
        assert refusals
        engine.wait()
        assert committed(root) == ["step-00000001"]


@pytest.mark.parametrize("outer", ["pending", "done", "add_done_callback", "cancel", "result"])
def test_a_handler_may_save_between_any_two_bytecodes_that_only_look(root: Path, outer: str) -> None:
    with sync.CheckpointEngine(root) as engine:
        earlier = engine.save(STATE, step=0)
        earlier.upload_completion.result(PATIENCE)
        looks: dict[str, Callable[[], object]] = {
            "pending": lambda: engine.pending,
            "done": lambda: earlier.upload_completion.done(),
            "add_done_callback": lambda: earlier.upload_completion.add_done_callback(lambda _: None),
            "cancel": earlier.cancel,
            "result": lambda: earlier.upload_completion.result(PATIENCE),
        }
        steps = iter(range(1, 1000))

        def look() -> None:
            def handler() -> None:
                engine.save(STATE, step=next(steps)).upload_completion.result(PATIENCE)

            with Between(7, handler) as between:
                for _ in range(3):
                    looks[outer]()
            assert between.calls > 0

        in_thread(look)
        assert len(committed(root)) == next(steps)


def test_a_handler_may_wait_for_an_earlier_save_between_any_two_bytecodes_of_a_look(
    root: Path, faulty: FaultyStorage
) -> None:
    """The handle that is looked at is not settled yet: the loop has to settle it under the looker's hands."""
    with sync.CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        for place in range(0, 40, 4):
            seen = [0]
            with faulty.hold("put") as gate:
                response = engine.save(STATE, step=place)

                def handler(place: int = place, seen: list[int] = seen, gate: Any = gate) -> None:
                    seen[0] += 1
                    if seen[0] == place + 1:
                        gate.release()
                        engine.save(STATE, step=1000 + place).upload_completion.result(PATIENCE)

                def look(response: Any = response, handler: Any = handler) -> None:
                    with Between(1, handler):
                        response.upload_completion.done()
                        response.upload_completion.add_done_callback(lambda _: None)
                        _ = engine.pending

                in_thread(look)
            response.upload_completion.result(PATIENCE)
            faulty.heal()


class Interrupt(KeyboardInterrupt):
    """No other part of the test raises it."""


class AtLine:
    """Interrupts the traced thread at the ``at``-th line of some modules of ours."""

    def __init__(self, at: int, modules: tuple[str, ...]) -> None:
        self.at, self.seen = at, 0
        self._files = {f"{PACKAGE}/{name}.py" for name in modules}

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        # before the release of a lock the interpreter lets no handler run, only a trace function
        if event == "line" and not re.search(r"with \w+\._(numbering|lock)", line):
            self.seen += 1
            if self.seen == self.at:
                raise Interrupt
        return self.trace

    def during(self, work: Callable[[], object]) -> int:
        """How many lines ``work`` came by."""
        sys.settrace(self.trace)
        try:
            work()
        except Interrupt:
            pass
        finally:
            sys.settrace(None)
        return self.seen


def test_an_interrupt_at_any_line_of_a_save_costs_no_place(root: Path) -> None:
    with sync.CheckpointEngine(root) as engine:
        engine.save(STATE).upload_completion.result(PATIENCE)

        def save_at(at: int) -> int:
            return AtLine(at, ("engine/saves", "engine/admission")).during(lambda: engine.save(STATE))

        def all_lines() -> None:
            total = save_at(0)
            assert total > 50
            for at in range(1, total + 1):
                save_at(at)
                engine.save(STATE).upload_completion.result(PATIENCE)
            engine.wait()

        in_thread(all_lines)


def test_an_interrupt_at_any_line_of_a_save_leaves_no_optimizer_waiting(root: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    watched, other = (torch.optim.SGD([weight], lr=0.1) for _ in range(2))
    with sync.CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:

        def save() -> None:
            engine.save({"w": weight, "optim": watched})

        def save_at(at: int) -> int:
            return AtLine(at, ("engine/saves", "engine/optimizer_hooks")).during(save)

        def all_lines() -> None:
            total = save_at(0)
            assert total > 40
            for at in range(1, total + 1):
                save_at(at)
                watched.step()
                other.step()
            engine.wait()

        in_thread(all_lines)


# --- real signals ---------------------------------------------------------------------------------


@pytest.fixture
def on_signal() -> Any:
    """Installs a handler for SIGUSR1 in the main thread."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda fn: signal.signal(signal.SIGUSR1, lambda *_: fn())
    signal.signal(signal.SIGUSR1, before)


def send_when(gate: Any) -> None:
    gate.wait_arrived()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    gate.handled.wait(PATIENCE)
    gate.release()


@pytest.mark.parametrize("verb", ["save", "result", "latest", "wait", "close", "abort"])
def test_a_signal_that_interrupts_a_waiting_save_is_told_to_set_a_flag(
    root: Path, faulty: FaultyStorage, on_signal: Any, verb: str
) -> None:
    errors: list[BaseException] = []
    small = StagingOptions(part_bytes=PART, budget_bytes=4 * PART)
    with sync.CheckpointEngine(faulty, staging=small) as engine, faulty.hold("put") as gate:
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: engine.save(STATE, step=7),
            "result": lambda: engine.pending[0].upload_completion.result(PATIENCE),
            "latest": engine.latest,
            "wait": engine.wait,
            "close": engine.close,
            "abort": engine.abort,
        }

        def handler() -> None:
            try:
                calls[verb]()
            except BaseException as error:
                errors.append(error)
            gate.handled.set()  # type: ignore[attr-defined]  # of this test

        gate.handled = threading.Event()  # type: ignore[attr-defined]
        on_signal(handler)
        sender = threading.Thread(target=send_when, args=(gate,))
        sender.start()
        engine.save(WIDE, step=1).upload_completion.result(PATIENCE)
        sender.join()
        assert [type(error) for error in errors] == [EngineStateError]
        assert_same(engine.read(1), WIDE)


@pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])
def test_a_signal_that_interrupts_training_may_save(root: Path, on_signal: Any, overlap: bool) -> None:
    with sync.CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:
        on_signal(lambda: engine.save(STATE, step=3).upload_completion.result(PATIENCE))
        signal.raise_signal(signal.SIGUSR1)
        assert committed(root) == ["step-00000003"]


def test_a_signal_within_an_optimizers_step_may_save(root: Path, on_signal: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optim = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(4)
    state = {"p": parameter, "optim": optim}
    # no bound: engines that earlier tests have dropped leave hooks in torch, which are interrupted as well
    steps = itertools.count(1)
    with sync.CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:

        def save() -> None:
            engine.save(state, step=next(steps)).upload_completion.result(PATIENCE)

        save()

        def step() -> None:
            with Between(3, save, modules=("engine/optimizer_hooks",)) as between:
                optim.step()
            assert between.calls > 3

        in_thread(step)


# --- the user's own code inside of a verb ---------------------------------------------------------


class Reacting:
    """A Stateful that calls back."""

    def __init__(self, react: Callable[[], object]) -> None:
        self.react = react

    def state_dict(self) -> dict[str, Any]:
        self.react()
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.react()


class Leaf:
    """A leaf that calls back when it is pickled."""

    react: Callable[[], object] = staticmethod(lambda: None)

    def __reduce__(self) -> Any:
        type(self).react()
        return (dict, ())


@pytest.mark.parametrize("verb", ["save", "latest", "close", "wait"])
@pytest.mark.parametrize("where", ["state_dict", "load_state_dict", "__reduce__", "__del__"])
def test_the_states_own_code_is_told_at_once(root: Path, where: str, verb: str) -> None:
    errors: list[BaseException] = []
    with sync.CheckpointEngine(root, trust=dcp_async.Trust(unsafe=True)) as engine:
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: engine.save(STATE, step=9),
            "latest": engine.latest,
            "close": engine.close,
            "wait": engine.wait,
        }

        def react() -> None:
            try:
                calls[verb]()
            except BaseException as error:
                errors.append(error)

        class Dying:
            def __del__(self) -> None:
                react()

        def drop() -> None:
            Dying()

        stateful = Reacting(lambda: None)
        state: dict[str, Any] = {"own": stateful, "n": 1}
        if where == "__reduce__":
            Leaf.react = staticmethod(react)
            state["leaf"] = Leaf()
        elif where == "state_dict":
            stateful.react = react
        elif where == "__del__":
            stateful.react = drop
        in_thread(lambda: engine.save(state, step=1).upload_completion.result(PATIENCE))
        if where == "load_state_dict":
            stateful.react = react
            in_thread(lambda: engine.load(state, 1))
        stateful.react, Leaf.react = lambda: None, staticmethod(lambda: None)
        assert errors
        assert {type(error) for error in errors} == {EngineStateError}
        engine.save(STATE, step=2).upload_completion.result(PATIENCE)


async def test_a_coroutine_driven_from_within_state_dict_is_told_at_once(root: Path) -> None:
    errors: list[BaseException] = []
    async with CheckpointEngine(root) as engine:

        def react() -> None:
            coro = engine.save(STATE, step=9)
            try:
                coro.send(None)
            except EngineStateError as error:
                errors.append(error)
            finally:
                coro.close()

        await (await engine.save({"own": Reacting(react)}, step=1)).upload_completion
        assert len(errors) == 1


async def test_a_task_made_within_state_dict_saves_after_it(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        tasks: list[asyncio.Task[Any]] = []

        def react() -> None:
            tasks.append(asyncio.ensure_future(engine.save(STATE, step=2)))

        await engine.save({"own": Reacting(react)}, step=1)
        await (await asyncio.wait_for(tasks[0], PATIENCE)).upload_completion
    assert committed(root) == ["step-00000001", "step-00000002"]


async def test_two_tasks_of_one_thread_may_be_in_save_at_once(root: Path, faulty: FaultyStorage) -> None:
    small = StagingOptions(part_bytes=PART, budget_bytes=4 * PART)
    async with CheckpointEngine(faulty, staging=small, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("put") as gate:
            first = asyncio.ensure_future(engine.save(WIDE, step=1))
            await gate.until_arrived()
            second = asyncio.ensure_future(engine.save(STATE, step=2))
            await asyncio.sleep(0)
            assert not first.done()
        for task in (first, second):
            await (await task).upload_completion


async def test_blocking_on_an_upload_whose_save_this_thread_has_to_finish_is_refused(
    root: Path, faulty: FaultyStorage
) -> None:
    small = StagingOptions(part_bytes=PART, budget_bytes=4 * PART)
    async with CheckpointEngine(faulty, staging=small) as engine:
        with faulty.hold("put") as gate:
            saving = asyncio.ensure_future(engine.save(WIDE, step=1))
            await gate.until_arrived()
            with pytest.raises(EngineStateError, match="has returned"):
                engine.pending[0].upload_completion.result(PATIENCE)
        await (await saving).upload_completion


# --- observers and callbacks ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError, GeneratorExit, SystemExit, KeyboardInterrupt, BaseException, OSError]
)
async def test_whatever_an_observer_raises_fails_no_save(
    root: Path, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(event: Any) -> None:
        raise error

    async with CheckpointEngine(root, observer=EventLog(fail)) as engine:
        for step in range(2):
            await (await engine.save(STATE, step=step)).upload_completion
    assert committed(root) == ["step-00000000", "step-00000001"]
    assert any("observer failed" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("error", [asyncio.CancelledError, GeneratorExit, BaseException])
async def test_whatever_a_done_callback_raises_fails_no_save(root: Path, error: type[BaseException]) -> None:
    def fail(handle: Any) -> None:
        raise error

    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=0)
        for handle in (response.staging_completion, response.upload_completion):
            if not handle.done():
                handle.add_done_callback(fail)
        await response.upload_completion
        await (await engine.save(STATE, step=1)).upload_completion


def test_a_failed_save_in_a_handler_does_not_stop_the_next(root: Path, on_signal: Any) -> None:
    with sync.CheckpointEngine(root) as engine:
        on_signal(lambda: engine.save({"bad": lambda: None}, step=1))
        with pytest.raises(SaveError):
            signal.raise_signal(signal.SIGUSR1)
        engine.save(STATE, step=2).upload_completion.result(PATIENCE)
