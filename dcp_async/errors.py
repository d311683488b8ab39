"""The errors that users see. Every one says what failed, where, and what to do.

CheckpointError(Exception)
|-- SaveError
|   |-- SaveCancelled
|   |-- StateMutatedError
|   |-- ReplicationError
|   `-- CheckpointExistsError (FileExistsError)
|-- LoadError
|   |-- CheckpointNotFoundError (FileNotFoundError)
|   |-- CorruptCheckpointError
|   |-- IncompatibleStateError
|   `-- UntrustedCheckpointError
|-- PreemptionError
|-- StorageError (OSError)
`-- EngineStateError (RuntimeError)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

Phase = Literal["capture", "plan", "stage", "write", "commit"]


class CheckpointError(Exception):
    """The root of every error that this package raises on purpose."""


class SaveError(CheckpointError):
    """A save failed and no checkpoint of its name was committed by it.

    One case can't be told from here: a coordinator that dies in the moment of the commit. The other ranks'
    saves fail, and ``latest()`` says whether the checkpoint is there.

    ``failures`` maps a rank to what went wrong there; ``__cause__`` is the first of them.
    """

    def __init__(
        self,
        message: str,
        *,
        checkpoint_id: str,
        step: int | None = None,
        phase: Phase = "capture",
        failures: Mapping[int, BaseException] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.checkpoint_id = checkpoint_id
        self.step = step
        self.phase = phase
        self.failures: dict[int, BaseException] = dict(failures or {})

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own passes nothing by keyword. Without ``failures``, of classes that may not pickle:
        # stock's ranks send each other what they raise, and the message has it all
        cls = partial(type(self), checkpoint_id=self.checkpoint_id, step=self.step, phase=self.phase)
        return cls, (self.message,)

    def fresh(self) -> Self:
        """An equal error with no traceback yet: one raised to many waiters would grow with each of them."""
        twin = type(self)(
            self.message,
            checkpoint_id=self.checkpoint_id,
            step=self.step,
            phase=self.phase,
            failures=self.failures,
        )
        twin.__cause__ = self.__cause__
        return twin


class SaveCancelled(SaveError):
    """The save was cancelled by ``response.cancel()`` or ``engine.abort()``; its files are gone."""


class StateMutatedError(SaveError):
    """With ``overlap=True`` a tensor was changed before it had been staged; nothing was committed."""


class ReplicationError(SaveError):
    """The checkpoint is committed in the near tier, and this engine does not know it to be in the far one:
    the message says why. What is near is whole, and can be loaded."""


class CheckpointExistsError(SaveError, FileExistsError):
    """A checkpoint of this name is committed and ``replace=True`` was not given."""


class LoadError(CheckpointError):
    """A checkpoint could not be loaded. ``checkpoint_id`` is None where no checkpoint was chosen yet."""

    def __init__(self, message: str, *, checkpoint_id: str | None = None) -> None:
        super().__init__(message)
        self.checkpoint_id = checkpoint_id


class CheckpointNotFoundError(LoadError, FileNotFoundError):
    """No committed checkpoint of this name or step exists under the root."""


class CorruptCheckpointError(LoadError):
    """The checkpoint's bytes are not the bytes that were written.

    ``partially_loaded`` tells whether targets already hold bytes of it; ``tensors`` names what lies in the
    bad blocks.
    """

    def __init__(
        self,
        message: str,
        *,
        checkpoint_id: str | None = None,
        partially_loaded: bool = False,
        tensors: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, checkpoint_id=checkpoint_id)
        self.partially_loaded = partially_loaded
        self.tensors = tensors


class IncompatibleStateError(LoadError):
    """The state that was passed and the checkpoint do not fit; no target was touched."""


class UntrustedCheckpointError(LoadError):
    """The checkpoint names a global, or is behind a link, that ``Trust`` does not allow; nothing of it was
    run or read."""


class PreemptionError(CheckpointError):
    """The process was asked to stop, and there is no durable checkpoint of the step that its ranks were told
    to save; or they could not be told one. The message says why."""


class StorageError(CheckpointError, OSError):
    """A storage verb failed: ``verb`` on ``path``; ``errno`` is the operating system's, where there is
    one."""

    def __init__(self, message: str, *, verb: str, path: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.verb = verb
        self.path = path
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), verb=self.verb, path=self.path, errno=self.errno), (str(self),)

    @classmethod
    def of(cls, verb: str, path: str, cause: OSError) -> StorageError:
        """The error for ``cause``, raised by ``verb`` on ``path``; raise it ``from`` the cause."""
        reason = cause.strerror or str(cause) or type(cause).__name__
        return cls(f"cannot {verb} {path}: {reason}", verb=verb, path=path, errno=cause.errno)


class EngineStateError(CheckpointError, RuntimeError):
    """The call does not fit the state of the engine: not open, closed, forked, or made from its own
    thread."""
