"""Asks Statefuls for their state, on all ranks in one order: a ``state_dict()`` may run collectives.

Enters: a state, in whose mappings a rank may have put the same names in an order of its own. Leaves: what
each Stateful gave, for whoever flattens the state, which goes by the mapping's order. Invariant: two
Statefuls that two ranks have in common are asked in the same order on both, whatever else the ranks hold.
"""

from __future__ import annotations

import concurrent.futures
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._foreign import ENDINGS, user_code, words
from ..formats import text_of
from .containers import ATOMS, CaptureError, Kind, kind_of_value
from .depth import MAX_DEPTH
from .stateful import AppState, PerRank, RNGState, snapshot_of_ours

Given = dict[tuple[str, int], tuple[Any, Any]]
"""(name, id of a Stateful) -> (it, what it gave) of those that were asked before the state is flattened, in
the order of asking. One that gives another shares its name with that."""

UNASKED: Any = object()
"""In place of what a Stateful would have given, had it been asked."""


def snapshot_to_fill(name: str, stateful: Any) -> Any:
    """As ``snapshot``; an AppState also makes the entries that its optimizers lack, as it does for stock:
    what is not there could not be filled."""
    return snapshot(name, stateful, is_to_fill=True)


def snapshot(name: str, stateful: Any, *, is_to_fill: bool = False) -> Any:
    """What the ``state_dict()`` of ``stateful``, which lies at ``name``, gives. Raises CaptureError."""
    try:
        with user_code("state_dict", stateful, name):
            if isinstance(stateful, RNGState) or (isinstance(stateful, AppState) and not is_to_fill):
                inner = snapshot_of_ours(stateful)
            else:
                inner = stateful.state_dict()
    except ENDINGS:
        raise
    except BaseException as error:  # the trainer's own code, which may raise anything
        raise CaptureError(
            f"{name}: {type(stateful).__name__}.state_dict() failed ({words(error)})"
        ) from error
    if (
        inspect.isawaitable(inner)
        or inspect.isasyncgen(inner)
        or isinstance(inner, concurrent.futures.Future)
    ):
        if inspect.iscoroutine(inner):
            inner.close()
        raise asynchronous_error(name, stateful)
    return inner


def asynchronous_error(name: str, stateful: object) -> CaptureError:
    """For a ``state_dict()`` that would have to be awaited."""
    return CaptureError(
        f"{name}: {type(stateful).__name__}.state_dict() is asynchronous; a snapshot must be taken "
        "in one piece, so give the state an object whose state_dict() returns a plain dict"
    )


def ask_in_order(
    state: Mapping[str, Any],
    rank: int,
    given: Given,
    ask: Callable[[str, Any], Any] = snapshot,
    *,
    is_load: bool = False,
) -> None:
    """Ask each Stateful in ``state`` that is not in ``given`` for its state: level by level by the text of
    its key, what it gave before what comes next. ``ask`` does it, or gives UNASKED; what is FromRank it is
    asked for on that rank alone, unless all of them load it (``is_load``).

    Raises: CaptureError of a ``state_dict()`` that fails.
    """
    if isinstance(state, Mapping):  # else flatten() says so
        asking = _Asking(rank, given, ask, is_load)
        try:
            asking.visit_all(state.items(), "", 0, is_own=False)
        except (CaptureError, *ENDINGS):
            raise
        except RecursionError:
            return  # flatten() says whether it goes in circles, and where
        except BaseException as error:  # mappings of the trainer's own may raise anything
            where = asking.where or "the state"
            raise CaptureError(f"{where}: it can't be looked at ({words(error)})") from error


class _Asking:
    """Goes over a state and asks whom it meets."""

    def __init__(self, rank: int, given: Given, ask: Callable[[str, Any], Any], is_load: bool) -> None:
        self._rank = rank
        self._is_load = is_load
        self._own = PerRank.key(rank)
        self._given = given
        self._ask = ask
        self.where = ""
        """The name that it has come to."""

    def visit_all(self, entries: Iterable[tuple[Any, Any]], above: str, depth: int, *, is_own: bool) -> None:
        # by their types first: most values of a large mapping are tensors, whose keys need no text
        inner = [(text_of(key), value) for key, value in entries if type(value) not in ATOMS]
        for key, value in sorted(inner, key=lambda entry: entry[0]) if len(inner) > 1 else inner:
            self._visit(f"{above}.{key}" if above else key, value, depth, is_own=is_own)

    def _visit(self, name: str, value: Any, depth: int, *, is_own: bool) -> None:
        self.where = name
        if depth > MAX_DEPTH:
            return  # whoever flattens the state refuses what goes deeper, or in circles, and says where
        match kind_of_value(value, is_own=is_own):
            case Kind.OWN | Kind.STATEFUL as kind:
                if kind is Kind.OWN:
                    name = f"{name}.{self._own}"
                asked = (name, id(value))
                if asked not in self._given:
                    self._given[asked] = (value, self._ask(name, value))
                if (inner := self._given[asked][1]) is not UNASKED:
                    self._visit(name, inner, depth + 1, is_own=is_own)
            case Kind.MAPPING:
                self.visit_all(value.items(), name, depth + 1, is_own=is_own)
            case Kind.PER_RANK:
                self._visit(f"{name}.{self._own}", value.value, depth + 1, is_own=True)
            case Kind.FROM_RANK if self._is_load or value.rank == self._rank:
                self._visit(name, value.value, depth + 1, is_own=True)
            case Kind.LIST:
                for index, entry in enumerate(value):
                    self._visit(f"{name}.{index}", entry, depth + 1, is_own=is_own)
