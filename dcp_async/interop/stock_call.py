"""What one call through a part of stock's needs: a loop, one thread for all its calls, the other ranks.

Enters: a writer, reader, planner or stager of anybody's, whose methods block and raise what they like.
Leaves: results on a loop of our own, failures labelled with what was being done. Invariant: all calls of a
save or load come from one thread, since stock's parts keep thread-local and event-loop state; a part that is
in use by one call is waited for by the next.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch.distributed.checkpoint.stateful import Stateful

from .._concurrency import BlockingThreads, LoopThread, SignalSafeFuture, Wait
from .._foreign import user_code
from ..coordination import Coordination, PhaseFailure, make_coordinator
from ..errors import EngineStateError, Phase
from ..options import Timeouts
from .stagers import Unstaged

T = TypeVar("T")
P = ParamSpec("P")


def require(value: object, what: str, methods: Iterable[str]) -> None:
    """Raises TypeError for a ``value`` that has not all of the methods of ``what``."""
    lacking = [method for method in methods if not callable(getattr(value, method, None))]
    if lacking or isinstance(value, type):
        reason = "is a class, not an object" if isinstance(value, type) else f"has no {', '.join(lacking)}()"
        raise TypeError(f"{what} is needed, and {value!r:.200} {reason}")


def check_state(state_dict: object) -> None:
    """Raises TypeError for what is no dict of names."""
    if isinstance(state_dict, Unstaged):  # it fails where it is asked, so that the other ranks are told
        return
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"state_dict is a dict whose keys are str, not {type(state_dict).__name__}")


def asked(state_dict: Mapping[str, Any], activity: Any) -> dict[str, Any]:
    """``state_dict`` with what its Statefuls give, who are asked once, in one order on all ranks."""
    given: dict[str, Any] = {}
    with activity.watched():
        # sorted: a state_dict() may run collectives, and a rank's dict may have an order of its own
        for key in sorted(state_dict):
            value = state_dict[key]
            if isinstance(value, Stateful):
                with user_code("state_dict", value, key):
                    value = value.state_dict()
                if hasattr(value, "__await__"):
                    raise TypeError(
                        f"{key}: its state_dict() is asynchronous; stock's parts take a plain dict"
                    )
            given[key] = value
    return {key: given[key] for key in state_dict}


_in_use: dict[tuple[int, int], SignalSafeFuture[None]] = {}
"""(process, id) of a part -> done when its call has ended, which keeps the part alive until then."""
_in_use_lock = threading.Lock()


class Claim:
    """The parts of one call, which no other call uses meanwhile."""

    def __init__(self, parts: Iterable[object]) -> None:
        self._parts = [part for part in parts if part is not None]
        # with the process: a forked child has the table, and no thread that ends what is in it
        self._keys = {(os.getpid(), id(part)) for part in self._parts}
        self._ended: SignalSafeFuture[None] = SignalSafeFuture()

    async def take(self) -> None:
        """Wait until nobody uses any of them."""
        while (other := self._try()) is not None:
            await Wait(other).wait()

    def _try(self) -> SignalSafeFuture[None] | None:
        # all or none, so that two calls never wait for each other
        with _in_use_lock:
            for key in self._keys:
                if (other := _in_use.get(key)) is not None:
                    return other
            _in_use.update(dict.fromkeys(self._keys, self._ended))
        return None

    def release(self) -> None:
        """The call has ended. A second call does nothing."""
        with _in_use_lock:
            if self._ended.done():
                return
            for key in self._keys:
                if _in_use.get(key) is self._ended:
                    del _in_use[key]
        self._ended.set_result(None)


class StockCall:
    """The loop, the thread and the ranks of one save or load. Owns them; ``close`` and ``stop`` end them."""

    def __init__(self, coordination: Coordination, verb: Literal["save", "load"]) -> None:
        """Raises EngineStateError as an engine's ``open()`` does."""
        self.timeouts = Timeouts()
        self.coordinator = make_coordinator(
            coordination,
            timeouts=self.timeouts,
            digest=f"{verb} through parts of torch.distributed.checkpoint",
            missed=lambda ordinal, name: None,
        )
        self.loop = LoopThread("dcp_async-stock")
        try:
            self.loop.start()
            # one: all calls of a save or load come from the same thread
            self._threads = BlockingThreads("dcp_async-stock-work", 1)
        except RuntimeError as error:
            raise EngineStateError(
                f"no thread can be started ({error}); call before the program ends"
            ) from error

    def __repr__(self) -> str:
        return f"<StockCall {self.coordinator!r}>"

    async def run(self, phase: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """``fn`` in the thread of this call. On the loop. Raises PhaseFailure alone.

        Cancellation: the call is waited for, then the cancellation goes on.
        """
        return await self._threads.run(_labelled, phase, lambda: fn(*args, **kwargs))

    async def close(self) -> None:
        """Leave the other ranks. On the loop."""
        await self.coordinator.close()

    def stop(self) -> None:
        """Let go of the threads, without waiting for them; callable from every thread."""
        self._threads.shutdown(wait=False)
        self.loop.stop()


def _labelled(phase: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except BaseException as error:
        # all of it: DCP's own errors are no Exceptions, and what would end a program or a task ends
        # neither the trainer's nor ours when a writer's code raises it here
        raise PhaseFailure(label(phase), error) from error


def label(phase: str) -> Phase:
    """``phase`` of a load, for a PhaseFailure, which carries any word to the rank that tells it."""
    known: Any = phase
    labelled: Phase = known
    return labelled


def packed(what: str, value: object) -> bytes:
    """A plan or a result on its way to another rank, as a pickle like in stock: its classes may be of
    anybody's. Raises TypeError."""
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(f"{what} can't be pickled for the other ranks: {error}") from error


def synchronize_device() -> None:
    """Wait for what is queued on the current accelerator: targets are filled from another thread's stream."""
    if torch.accelerator.is_available():
        module = torch.get_device_module()
        # asked for more, one that nobody uses would be initialised
        if not hasattr(module, "is_initialized") or module.is_initialized():
            torch.accelerator.synchronize()
