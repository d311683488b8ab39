"""What the verbs that read share: an engine's services, the checkpoints they choose from, and their errors.

Enters: an engine's Lifetime, and what is open already where a verb is one of an opened checkpoint. Leaves:
services, waits, writers to devices, errors of the tree. Owns nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import torch

from .._concurrency import Job, Verb, Wait
from .._foreign import is_foreign, words
from ..catalog import Catalog, Opened, is_path
from ..coordination import RemoteFailure
from ..errors import LoadError
from ..load import Agreement, DeviceWrites, LoadServices
from ..staging import CaptureInProgressError
from .lifetime import Lifetime

T = TypeVar("T")

_HOST = ("cpu", "meta")
"""Kinds of devices that nothing is queued on."""


class LoadContext:
    """Where one engine's reads come from."""

    def __init__(self, life: Lifetime, opened: Opened | None = None) -> None:
        """``opened``: the checkpoint that is meant, whatever has been saved since; None for all of the
        root."""
        self.life = life
        self.opened = opened

    @property
    def catalog(self) -> Catalog | Opened:
        """What a verb chooses from."""
        return self.opened or self.life.resources.catalog

    def after_saves_of(self, source: str | int) -> Verb[None]:
        """Wait for the earlier saves of this engine that ``source`` may mean, as if ``save`` had been all of
        them; one that fails is none. A cancelled wait leaves them alone."""
        # a path may be that of the root: the name at its end then is the save's
        name = os.path.basename(source) if isinstance(source, str) and is_path(source) else source
        for writer in self.life.book.pending() if self.opened is None else ():
            if name == "latest" or name in (writer.response.checkpoint_id, writer.response.step):
                yield Wait(writer.upload.future)
        self.life.check_open()  # it may have been closed meanwhile

    def ask(self, coro: Coroutine[Any, Any, T]) -> Verb[T]:
        """Run ``coro`` on the engine's loop."""
        return (yield from self.result_of(self.life.submit(coro)))

    def result_of(self, job: Job[T]) -> Verb[T]:
        """What ``job``, which runs on the engine's loop, gives; a cancelled wait cancels it."""
        with self.life.storage_errors("read"):
            value: T = yield job.join()
        return value

    def agreement(self) -> Agreement:
        """What the ranks load, they load alike."""
        have = self.life.resources
        return Agreement(have.catalog, have.coordinator, timeout=have.timeout, opened=self.opened)

    def services(self, most_at_once: int | None = None) -> LoadServices:
        """What a load borrows."""
        have = self.life.resources
        return LoadServices(
            threads=have.threads,
            stager=have.stager,
            io_concurrency=have.io_concurrency,
            timeout=have.timeout,
            trust=have.setup.trust,
            most_at_once=most_at_once,
        )

    def device(self, device: torch.device | str) -> torch.device:
        """``device``, with its index. In the caller's thread: the engine's own sits on device 0 whatever the
        caller has chosen. Raises LoadError."""
        with device_errors(device):
            place = torch.device(device)
            return place if place.type in _HOST else self.life.resources.stager.backend.resolve(place)

    def fresh_writes(self, services: LoadServices, device: torch.device) -> DeviceWrites | None:
        """What writes to ``device``, where tensors are made; None in host memory. In the caller's thread."""
        with device_errors(device):
            return writes_to(services, (), device)


def writes_to(
    services: LoadServices, devices: Iterable[torch.device], fresh: torch.device
) -> DeviceWrites | None:
    """What writes to ``devices``, and to ``fresh``, where tensors are made; None where all is host memory. In
    the caller's thread."""
    wanted = {device for device in (*devices, fresh) if device.type not in _HOST}
    if not wanted:
        return None
    try:
        return DeviceWrites(services.stager, wanted, services.threads, services.timeout)
    except CaptureInProgressError as error:
        raise LoadError(f"nothing can be loaded while a graph is captured: {error}") from error


@contextlib.contextmanager
def device_errors(device: torch.device | str) -> Iterator[None]:
    """What ``device`` raises where tensors are to be made becomes a LoadError."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        raise LoadError(f"no tensors can be made on {device}: {words(error)}; nothing was loaded") from error


@contextlib.contextmanager
def load_errors(name: str, touched: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """What the trainer's objects raise while a load looks at them becomes a LoadError."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error) or isinstance(error, (OSError, MemoryError, RemoteFailure)):
            raise  # the storage's, nobody's, or another rank's
        state = "targets are partly overwritten" if touched() else "nothing was loaded"
        raise LoadError(f"checkpoint {name!r}: {words(error)}; {state}", checkpoint_id=name) from error
