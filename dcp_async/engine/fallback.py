"""Which of several checkpoints is loaded: the newest that is whole, and what is said where none is.

Enters: names, best first, and what to do with one. Leaves: the value of the first that is whole, and what was
passed over. Invariant: a target that a corrupt checkpoint has touched is never forgotten.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from .._concurrency import Verb
from ..catalog import UnfitMetadataError
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, LoadError, StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

Trial = Callable[[str, bool], Verb[T]]
"""Loads a checkpoint by name; told whether an earlier one touched the targets."""


def first_whole(
    names: Sequence[str], trial: Trial[T], *, falls_back: bool
) -> Verb[tuple[T, Mapping[str, str]]]:
    """The first checkpoint that is whole; and of newer ones that are not, by name, what is wrong with
    them."""
    first: LoadError | None = None
    gone: CheckpointNotFoundError | None = None
    touched = False
    skipped: dict[str, str] = {}
    passed_over = ""
    for name in names:
        if passed_over:  # said of one that is followed by another: what is raised need not be
            logger.warning("%s; trying the next older one", passed_over)
            passed_over = ""
        try:
            value = yield from trial(name, touched)
        except (CorruptCheckpointError, UnfitMetadataError) as error:
            if not falls_back:
                raise
            first = first or error  # of all that are corrupt the newest is what the user asked for
            touched = touched or has_touched(error)
            skipped[name] = passed_over = str(error)
        except CheckpointNotFoundError as error:  # removed since it was chosen, as old ones are
            if not falls_back:
                raise
            gone = error
            logger.info("%s any more; trying the next older one", error)
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
