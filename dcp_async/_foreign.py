"""Where code that is not ours is called: what it raises becomes an error of the tree, whatever its class.

Enters: exceptions of the trainer's objects, of planners and of storages. Leaves: whether they are to be told
in words, and the words. Invariant: what ends a program or a task stays itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from .errors import CheckpointError, StorageError

ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What nobody may take for a failure of the code that it went through."""


def is_foreign(error: BaseException) -> bool:
    """Whether ``error`` is none of the tree and ends nothing."""
    return not isinstance(error, (CheckpointError, *ENDINGS))


def words(error: BaseException) -> str:
    """Class and message of ``error``, whose ``__str__`` may be as broken as the rest of it."""
    kind = type(error).__name__
    try:
        text = str(error)
    except ENDINGS:
        raise
    except BaseException as second:  # the trainer's class: nothing of it can be relied on
        return f"{kind} (its message can't be told: {type(second).__name__})"
    return f"{kind}: {text}" if text else kind


class FillError(Exception):
    """Code that is not ours failed while ``names`` were read: a target would not take its bytes, or a leaf's
    class would not be made."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


@contextlib.contextmanager
def storage_errors(verb: str, path: str, *, passing: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """What a storage raises while ``verb`` is done on ``path`` is a StorageError, but for ``passing``."""
    try:
        yield
    except OSError as error:
        if not is_foreign(error):
            raise
        raise StorageError.of(verb, path, error) from error
    except BaseException as error:
        if not is_foreign(error) or isinstance(error, passing):
            raise
        raise StorageError(f"cannot {verb} {path}: {words(error)}", verb=verb, path=path) from error
