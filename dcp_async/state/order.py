"""One order on all ranks in which Statefuls are asked: a ``state_dict()`` may run collectives.

Enters: a state, in whose mappings a rank may have put the same names in an order of its own. Leaves: what
each Stateful gave, for the walk, which goes by the mapping's order. Invariant: two Statefuls that two ranks
have in common are asked in the same order on both, whatever else the ranks hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .._foreign import ENDINGS, words
from ..formats import text_of
from .depth import MAX_DEPTH
from .flatten import PLAIN_TENSORS, UNASKED, CaptureError, Given, is_terminal, snapshot
from .stateful import PerRank, RNGState, is_stateful

_LEAVES = frozenset({*PLAIN_TENSORS, int, float, str, bool, bytes, complex, type(None)})


def ask_in_order(
    state: Mapping[str, Any], rank: int, given: Given, ask: Callable[[str, Any], Any] = snapshot
) -> None:
    """Ask each Stateful in ``state`` that is not in ``given`` for its state: level by level by the text of
    its key, what it gave before what comes next. ``ask`` does it, or gives UNASKED.

    Raises: CaptureError of a ``state_dict()`` that fails.
    """
    if isinstance(state, Mapping):  # else the walk says so
        asking = _Asking(rank, given, ask)
        try:
            asking.visit_all(state.items(), "", 0, is_own=False)
        except (CaptureError, *ENDINGS):
            raise
        except RecursionError:
            return  # the walk says whether it goes in circles, and where
        except BaseException as error:  # mappings of the trainer's own may raise anything
            where = asking.at or "the state"
            raise CaptureError(f"{where}: it can't be looked at ({words(error)})") from error


class _Asking:
    def __init__(self, rank: int, given: Given, ask: Callable[[str, Any], Any]) -> None:
        self._own = PerRank.key(rank)
        self._given = given
        self._ask = ask
        self.at = ""

    def visit_all(self, entries: Iterable[tuple[Any, Any]], above: str, depth: int, *, is_own: bool) -> None:
        inner = [(text_of(key), value) for key, value in entries if type(value) not in _LEAVES]
        for key, value in sorted(inner, key=lambda entry: entry[0]) if len(inner) > 1 else inner:
            self._visit(f"{above}.{key}" if above else key, value, depth, is_own=is_own)

    def _visit(self, name: str, value: Any, depth: int, *, is_own: bool) -> None:
        self.at = name
        if isinstance(value, torch.Tensor) or depth > MAX_DEPTH:
            return  # the walk refuses what goes deeper, or in circles, and says where
        if is_stateful(value):
            if isinstance(value, RNGState) and not is_own:
                name = f"{name}.{self._own}"
            asked = (name, id(value))
            if asked not in self._given:
                self._given[asked] = (value, self._ask(name, value))
            if (inner := self._given[asked][1]) is not UNASKED:
                self._visit(name, inner, depth + 1, is_own=is_own)
        elif isinstance(value, Mapping):
            self.visit_all(value.items(), name, depth + 1, is_own=is_own)
        elif isinstance(value, PerRank):
            self._visit(f"{name}.{self._own}", value.value, depth + 1, is_own=True)
        elif isinstance(value, list) and not is_terminal(value):
            for index, entry in enumerate(value):
                self._visit(f"{name}.{index}", entry, depth + 1, is_own=is_own)
