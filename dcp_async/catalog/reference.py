"""What names a checkpoint in a call: "latest", a name, a step, or what was told of it.

Enters: whatever a caller has at hand, numpy's integers, tensors of one element, paths and kinds of str
included. Leaves: a plain str or int; a path is absolute, which no name is. Invariant: what ``save`` takes for
a name or a step, every other verb takes for the same one.
"""

from __future__ import annotations

import logging
import operator
import os
from typing import Any

from ..info import CheckpointInfo, CheckpointRef

logger = logging.getLogger(__name__)


def reference(ref: CheckpointRef) -> str | int:
    """The plain name (or "latest"), absolute path or step that ``ref`` means. Raises: TypeError for what can
    be none of them; ValueError for a URL."""
    if isinstance(ref, CheckpointInfo):
        return ref.checkpoint_id
    if isinstance(ref, str):
        # the plain text, whatever a kind of str prints itself as
        return _name_or_path(str.__str__(ref))
    if isinstance(ref, os.PathLike):
        return _name_or_path(os.fsdecode(ref))
    step = _step(ref)
    if step is None:
        raise TypeError(
            f"a checkpoint is named by 'latest', its name, step, path or CheckpointInfo, not by {ref!r}"
        )
    return step


def is_path(ref: str | int) -> bool:
    """Whether what ``reference`` gave is a path, and no name below a root."""
    return isinstance(ref, str) and os.path.isabs(ref)


def _name_or_path(text: str) -> str:
    if "/" not in text:  # no name below a root has one
        return text
    if "://" in text:
        raise ValueError(
            f"{text!r} is a URL, which dcp_async.open_checkpoint(url) opens; an engine takes names below its "
            "root, and paths"
        )
    # now, and by whoever asked: a later chdir() does not move it
    return os.path.abspath(os.path.expanduser(text))


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
