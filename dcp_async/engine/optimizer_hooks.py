"""Optimizers wait for staging: the net under ``overlap=True`` that needs no await in the trainer.

Enters: optimizers found in a state, its tensors, and the future that its staging settles. Leaves: one
pre-step hook per optimizer, and one for all others of the process, which wait if they would change one of the
tensors. Invariant: a hook never raises and never returns early; a failed save reports through its handles,
not through somebody's training step. A thread that is interrupted in here, by a signal whose handler saves or
steps, does not wait for itself, and what the handler adds is not lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .._concurrency import SignalSafeFuture
from ..state import layers_of

P = ParamSpec("P")
T = TypeVar("T")

Staging = SignalSafeFuture[Any]
"""Done when a state may be mutated, or its save has failed; nobody here looks at which."""


def _no_tensors() -> tuple[()]:
    return ()


class _Save:
    """A save that is being staged, and the memory that it reads meanwhile."""

    def __init__(self, staging: Staging, tensors: Callable[[], Sequence[torch.Tensor]]) -> None:
        self.staging = staging
        self._tensors = tensors
        self._memory: set[int] | None = None
        self._apart: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def concerns(self, optimizer: Optimizer) -> bool:
        """Whether something that ``optimizer`` changes lies in the same storage as a tensor that is read.
        Also where that can't be told."""
        if self.staging.done() or optimizer in self._apart:
            return False
        try:
            if self._memory is None:  # looked at late: most saves never are
                self._memory = set(_storages(self._tensors()))
            if not self._memory.isdisjoint(_storages(_tensors_of(optimizer))):
                return True
        except RuntimeError:  # a tensor without a storage
            return True
        # noted, so that each further step of it costs a look into a set
        self._apart.add(optimizer)
        return False


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[int]:
    # without storages of no bytes: at address 0 all of them would be the same
    return filter(None, (tensor.untyped_storage().data_ptr() for tensor in tensors))


def _tensors_of(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Its parameters and its state, down to the tensors that have the bytes."""
    values = chain(
        (weight for group in optimizer.param_groups for weight in group["params"]),
        (value for entry in list(optimizer.state.values()) for value in list(entry.values())),
    )
    for tensor in values:
        if isinstance(tensor, torch.Tensor):
            for layer in layers_of(tensor):
                if not hasattr(type(layer), "__tensor_flatten__"):
                    yield layer


def _locked(
    method: Callable[Concatenate[OptimizerHooks, P], T],
) -> Callable[Concatenate[OptimizerHooks, P], T]:
    """``method`` while its object's lock is held."""

    # around the call, not inside of it: in CPython 3.13 an interrupt between two rounds of a loop passes by a
    # `with` of the same frame, and nobody would release the lock
    @functools.wraps(method)
    def call(hooks: OptimizerHooks, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with hooks._lock:
            return method(hooks, *args, **kwargs)

    return call


class OptimizerHooks:
    """The hooks of one engine. ``remove()`` takes them off again."""

    def __init__(self) -> None:
        self.waited = 0.0
        """Seconds for which optimizers were held back so far."""
        self._pid = os.getpid()
        # a signal handler may come in anywhere below, so each change is one step that can be made twice
        self._lock = threading.RLock()
        self._handles: weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]] = (
            weakref.WeakKeyDictionary()
        )
        self._staging: weakref.WeakKeyDictionary[Optimizer, list[Staging]] = weakref.WeakKeyDictionary()
        self._saves: list[_Save] = []
        self._for_others: list[RemovableHandle] = []

    @_locked
    def watch(
        self,
        optimizers: Iterable[Optimizer],
        staging: Staging,
        tensors: Callable[[], Sequence[torch.Tensor]] = _no_tensors,
    ) -> None:
        """Make each of ``optimizers`` wait for ``staging`` before its next step, and each other one that
        changes what ``tensors`` gives: the tensors that are read until then."""
        self._saves.append(_Save(staging, tensors))
        if not self._for_others:
            self._for_others.append(register_optimizer_step_pre_hook(_hook_for_others(self)))
        for optimizer in optimizers:
            waiting = self._staging.setdefault(optimizer, [])
            waiting.append(staging)
            for earlier in [other for other in waiting if other.done() and other is not staging]:
                with contextlib.suppress(ValueError):  # a handler was faster
                    waiting.remove(earlier)
            if not self._handles.setdefault(optimizer, []):
                self._handles[optimizer].append(optimizer.register_step_pre_hook(self._wait))
        self._forget_staged()

    def _wait(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            return  # a forked child has its own copy of the tensors, and nobody to wait for
        while waiting := self._waiting(optimizer):  # again: a signal handler may have saved meanwhile
            self._wait_for(waiting)

    def _wait_for(self, waiting: list[Staging]) -> None:
        began = time.monotonic()
        for staging in waiting:
            staging.wait()
        self.waited += time.monotonic() - began

    @_locked
    def _waiting(self, optimizer: Optimizer) -> list[Staging]:
        return [staging for staging in self._staging.get(optimizer, ()) if not staging.done()]

    def wait_for_others(self, optimizer: Optimizer) -> None:
        """Hold a step of ``optimizer`` back while it would change what is read; watched ones wait by
        themselves."""
        # without the lock: every step of every optimizer of the process comes through here
        if not self._saves or os.getpid() != self._pid:
            return
        while waiting := self._concerned(optimizer):
            self._wait_for(waiting)

    @_locked
    def _concerned(self, optimizer: Optimizer) -> list[Staging]:
        self._forget_staged()
        known = self._staging.get(optimizer, ())
        saves = [save for save in self._saves if save.staging not in known]
        return [save.staging for save in saves if save.concerns(optimizer)]

    def _forget_staged(self) -> None:
        for save in [save for save in self._saves if save.staging.done()]:
            with contextlib.suppress(ValueError):  # a signal handler was faster
                self._saves.remove(save)

    @_locked
    def remove(self) -> None:
        """Take the hooks off. Not while a step is running: torch iterates over its table of hooks."""
        for handles in list(self._handles.values()):
            for handle in list(handles):
                handle.remove()
        for handle in self._for_others:
            handle.remove()
        self._handles.clear()
        self._staging.clear()
        self._saves.clear()
        self._for_others.clear()


def _hook_for_others(hooks: OptimizerHooks) -> Callable[[Optimizer, Any, Any], None]:
    """A hook that does not keep the engine: torch keeps it for the whole process."""
    reference = weakref.ref(hooks)

    def wait(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := reference()) is not None:
            alive.wait_for_others(optimizer)

    return wait
