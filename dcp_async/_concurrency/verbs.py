"""One implementation of each verb for two worlds: verbs are generators that yield what they wait for.

``drive`` awaits it on the caller's loop, ``drive_blocking`` waits for it in the caller's thread. What a wait
raises, a cancellation or an interrupt included, is thrown into the verb at its ``yield``. Invariant: a thread
that is inside of a verb of an engine begins no other one of it, because that would wait for what only the
first can do; two threads, or two tasks of one thread, may.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, ParamSpec, TypeAlias, TypeVar

from ..errors import EngineStateError
from .waiting import Wait

P = ParamSpec("P")
T = TypeVar("T")


Verb: TypeAlias = Generator[Wait[Any], Any, T]


class Inside:
    """Which threads run a verb of one engine at this moment: all of a blocking verb, of an awaited one what
    lies between two waits.

    No lock, and no context manager: a signal handler may interrupt every line here, and raise.
    """

    def __init__(self) -> None:
        self._verbs: dict[int, str] = {}

    def check(self, verb: str) -> None:
        """Raises EngineStateError if this thread is inside of a verb already."""
        outer = self._verbs.get(threading.get_ident())
        if outer is not None:
            raise EngineStateError(
                f"{verb}() was called from inside of {outer}() by the same thread (a signal handler that "
                f"interrupted it, a state_dict(), a pickling hook, a __del__): it would wait for itself. Set "
                f"a flag there, and call {verb}() from the training loop once {outer}() has returned"
            )

    def run(self, verb: str, fn: Callable[..., T], *args: Any) -> T:
        """``fn(*args)``, inside of ``verb``."""
        me = threading.get_ident()
        outer = self._verbs.get(me)  # a loop that runs inside of another one goes on with a verb of its own
        try:
            self._verbs[me] = verb
            result: T = fn(*args)
            return result
        finally:
            if outer is None:
                self._verbs.pop(me, None)
            else:
                self._verbs[me] = outer


async def drive(name: str, verb: Verb[T], inside: Inside) -> T:
    """Run ``verb`` from a coroutine. Raises EngineStateError if this thread is inside of one."""
    inside.check(name)
    try:
        # inside only while the verb itself runs: between two waits other tasks of this thread may call verbs
        wait = inside.run(name, next, verb)
        while True:
            try:
                value = await wait.wait()
            except BaseException as error:
                # into the verb, which alone knows what it has taken
                wait = inside.run(name, verb.throw, error)
            else:
                wait = inside.run(name, verb.send, value)
    except StopIteration as end:
        result: T = end.value
        return result


def drive_blocking(name: str, verb: Verb[T], inside: Inside) -> T:
    """Run ``verb`` from a thread without a loop. Raises EngineStateError if this thread is inside of one."""
    inside.check(name)
    value: T = inside.run(name, _drive_blocking, verb)
    return value


def _drive_blocking(verb: Verb[T]) -> T:
    try:
        wait = next(verb)
        while True:
            try:
                value = wait.result()
            except BaseException as error:
                wait = verb.throw(error)
            else:
                wait = verb.send(value)
    except StopIteration as end:
        result: T = end.value
        return result


def run_coroutine(fn: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What the coroutine ``fn(*args)`` gives, from a thread that may have a loop that runs: then it runs on a
    thread of its own meanwhile, as on a notebook's."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(fn(*args, **kwargs))
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: asyncio.run(fn(*args, **kwargs))).result()
