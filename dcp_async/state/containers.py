"""What a state is made of: which values are gone into, and which are leaves.

Enters: any value of a state. Leaves: its Kind. Whoever goes over a state asks here, so that all of them enter
the same containers. How deep containers may lie, and circles, are depth.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any

import torch

from ..formats import PLAIN_DTYPES
from .checkpointable import is_checkpointable
from .stateful import FromRank, PerRank, RNGState, is_stateful

PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
_SCALARS = frozenset({int, float, str, bool, bytes, complex, type(None)})
ATOMS = frozenset({*PLAIN_TENSORS, *_SCALARS})
"""Types of most leaves, for whoever looks for containers only."""


class CaptureError(ValueError):
    """The state can't be saved as it is; the message names the leaf."""


class Kind(Enum):
    """How a value of a state is gone over, in the order in which it is found out."""

    TENSOR = auto()
    OWN = auto()
    """A Stateful that each rank has for itself, without standing in a PerRank."""
    STATEFUL = auto()
    MAPPING = auto()
    PER_RANK = auto()
    FROM_RANK = auto()
    LIST = auto()
    """One that is gone into; others are pickled whole."""
    LEAF = auto()


def kind_of_value(value: object, *, is_own: bool) -> Kind:
    """The Kind of ``value``; ``is_own`` says whether it lies inside of what is PerRank or FromRank."""
    if isinstance(value, torch.Tensor):
        return Kind.TENSOR
    # before Mapping: a dict of the trainer's that has a state_dict() is asked for that
    if is_stateful(value):
        return Kind.OWN if isinstance(value, RNGState) and not is_own else Kind.STATEFUL
    if isinstance(value, Mapping):
        return Kind.MAPPING
    if isinstance(value, PerRank):
        return Kind.PER_RANK
    if isinstance(value, FromRank):
        return Kind.FROM_RANK
    return Kind.LIST if isinstance(value, list) and not is_terminal(value) else Kind.LEAF


def is_terminal(values: list[Any]) -> bool:
    """Whether DCP pickles this list whole: it does unless a tensor or a mapping is in it."""
    if _SCALARS.issuperset(map(type, values)):  # an optimizer's list of parameters is long
        return True
    return _is_terminal(values, {})


def _is_terminal(values: list[Any], known: dict[int, list[Any]]) -> bool:
    """``known``: lists that are terminal; a list may refer to another any number of times."""
    for entry in values:
        # beyond DCP's rule: in a list that is pickled whole, objects would never be asked for their state
        if isinstance(entry, (torch.Tensor, Mapping, PerRank, FromRank)) or is_stateful(entry):
            return False
        if isinstance(entry, list) and id(entry) not in known:
            if not (_SCALARS.issuperset(map(type, entry)) or _is_terminal(entry, known)):
                return False
            known[id(entry)] = entry  # not before: one that lies in itself has to end in a RecursionError
    return True


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be copied raw; others go through ``torch.save``. A conjugate or negative view is
    resolved by the copy itself. Nested tensors are told apart later: asking each tensor would be felt."""
    return (
        type(tensor) in PLAIN_TENSORS
        and tensor.layout is torch.strided
        and tensor.dtype in PLAIN_DTYPES
        and not is_checkpointable(tensor)
    )
