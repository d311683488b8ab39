"""What names a checkpoint in a call: "latest", a name, a step, or what was told of it.

Enters: whatever a caller has at hand, numpy's integers, tensors of one element, paths and kinds of str
included. Leaves: a plain str or int. Invariant: what ``save`` takes for a name or a step, every other verb
takes for the same one.
"""

from __future__ import annotations

import logging
import operator
import os
from typing import Any

from ..info import CheckpointInfo, CheckpointRef

logger = logging.getLogger(__name__)


def reference(ref: CheckpointRef) -> str | int:
    """The plain name (or "latest") or step that ``ref`` means. Raises TypeError for what can be neither."""
    if isinstance(ref, CheckpointInfo):
        return ref.checkpoint_id
    if isinstance(ref, str):
        # the plain text, whatever a kind of str prints itself as
        return str.__str__(ref)
    if isinstance(ref, os.PathLike):
        return os.fsdecode(ref)
    step = _step(ref)
    if step is None:
        raise TypeError(
            f"a checkpoint is named by 'latest', its name, its step or its CheckpointInfo, not by {ref!r}"
        )
    return step


def _step(value: Any) -> int | None:
    """``value`` as an integer, if it is one, of whatever type; a truth value is none."""
    try:
        plain = value.item() if hasattr(value, "item") else value  # of an array or tensor of one element
        if isinstance(plain, float) and plain.is_integer():
            return int(plain)
        # a flag that was passed by mistake would name step 1
        return None if isinstance(plain, bool) else operator.index(plain)
    except Exception as error:  # a tensor's own code may raise anything: on meta, of many elements
        logger.debug("%s is no step: %s", type(value).__name__, error)
        return None
