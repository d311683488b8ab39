"""Optimizers wait for staging: the net under ``overlap=True`` that needs no await in the trainer.

Enters: optimizers found in a state, and the handle of its staging. Leaves: one pre-step hook per optimizer.
Invariant: the hook never raises and never returns early; a failed save reports through its handles, not
through somebody's training step. A thread that is interrupted in here, by a signal whose handler saves or
steps, does not wait for itself, and what the handler adds is not lost.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .response import CheckpointHandle


class OptimizerHooks:
    """The hooks of one engine. ``remove()`` takes them off again."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        # a signal handler may come in anywhere below, so each change is one step that can be made twice
        self._lock = threading.RLock()
        self._handles: weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]] = (
            weakref.WeakKeyDictionary()
        )
        self._staging: weakref.WeakKeyDictionary[Optimizer, list[CheckpointHandle[None]]] = (
            weakref.WeakKeyDictionary()
        )

    def watch(self, optimizers: Iterable[Optimizer], staging: CheckpointHandle[None]) -> None:
        """Make each of ``optimizers`` wait for ``staging`` before its next step."""
        with self._lock:
            for optimizer in optimizers:
                waiting = self._staging.setdefault(optimizer, [])
                waiting.append(staging)
                for handle in [handle for handle in waiting if handle.done() and handle is not staging]:
                    with contextlib.suppress(ValueError):  # a handler was faster
                        waiting.remove(handle)
                if not self._handles.setdefault(optimizer, []):
                    self._handles[optimizer].append(optimizer.register_step_pre_hook(self._wait))

    def _wait(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            return  # a forked child has its own copy of the tensors, and nobody to wait for
        while waiting := self._waiting(optimizer):  # again: a signal handler may have saved meanwhile
            for handle in waiting:
                handle._future.wait()

    def _waiting(self, optimizer: Optimizer) -> list[CheckpointHandle[None]]:
        with self._lock:
            return [handle for handle in self._staging.get(optimizer, ()) if not handle.done()]

    def remove(self) -> None:
        """Take the hooks off. Not while a step is running: torch iterates over its table of hooks."""
        with self._lock:
            for handles in list(self._handles.values()):
                for handle in list(handles):
                    handle.remove()
            self._handles.clear()
            self._staging.clear()
