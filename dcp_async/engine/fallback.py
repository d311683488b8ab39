"""Which of several checkpoints is loaded: the newest that is whole, and what is said where none is.

Enters: what chooses names, best first, and what to do with one. Leaves: the value of the first that is whole,
and what was passed over. Invariant: a target that a corrupt checkpoint has touched is never forgotten.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .._concurrency import Verb
from ..catalog import UnfitMetadataError
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, LoadError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Choice = Callable[[], Verb[Sequence[str]]]
"""The names to try as they are now, best first."""
Trial = Callable[[str, bool], Verb[T]]
"""Loads a checkpoint by name; told whether an earlier one touched the targets."""


def first_whole(choose: Choice, trial: Trial[T], *, falls_back: bool) -> Verb[tuple[T, Mapping[str, str]]]:
    """The first checkpoint that is whole; and of newer ones that are not, by name, what is wrong with
    them.

    ``falls_back``: whether any will do; if not, the first name is the only one.
    """
    first: LoadError | None = None
    gone: CheckpointNotFoundError | None = None
    touched = False
    skipped: dict[str, str] = {}
    passed_over = ""
    names, tried = deque((yield from choose())), set[str]()
    while names:
        tried.add(name := names.popleft())
        if passed_over:  # said of one that is followed by another: what is raised need not be
            logger.warning("%s; trying the next older one", passed_over)
            passed_over = ""
        try:
            try:
                value = yield from trial(name, touched)
            except CheckpointNotFoundError as error:
                if not falls_back:
                    raise
                gone = error
                # whoever removed it, as old ones are, has saved a newer one before
                logger.info("%s any more; looking again", error)
                names = deque(other for other in (yield from choose()) if other not in tried)
                continue
        except (CorruptCheckpointError, UnfitMetadataError) as error:
            if not falls_back:
                raise
            first = first or error  # of all that are corrupt the newest is what the user asked for
            touched = touched or has_touched(error)
            skipped[name] = passed_over = str(error)
        except (LoadError, StorageError) as error:
            # targets that an earlier checkpoint has touched are what the caller must hear of, whatever
            # ends the search
            if not touched:
                raise
            raise _overwritten(
                next(iter(skipped)), f"{first}; and the next older one can't be loaded ({error})"
            ) from error
        else:
            return value, skipped
    if first is None:
        assert gone is not None
        raise gone
    if touched and not has_touched(first):
        raise _overwritten(next(iter(skipped)), f"{first}; and the older ones are corrupt as well") from first
    raise first


def has_touched(error: LoadError) -> bool:
    return isinstance(error, CorruptCheckpointError) and error.partially_loaded


def _overwritten(name: str, what: str) -> CorruptCheckpointError:
    message = f"{what}. The state holds bytes of a corrupt checkpoint"
    return CorruptCheckpointError(message, checkpoint_id=name, partially_loaded=True)
