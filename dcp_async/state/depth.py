"""Why a state could not be walked: containers in circles, or too deep.

Enters: a state that a recursive walk gave up on, and what its Statefuls gave. Leaves: a message. Iterative,
so that it ends whatever the state holds, and asks nobody anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..formats import text_of
from .stateful import FromRank, PerRank

MAX_DEPTH = 200
"""How deep containers may lie in one another. All that goes over a state does so recursively, and must not
run into Python's own limit, which is at 1,000 calls."""
_SHOWN = 60


def _shortened(name: str) -> str:
    return name if len(name) <= 2 * _SHOWN else f"{name[:_SHOWN]}...{name[-_SHOWN:]}"


def why_too_deep(
    state: Mapping[str, Any], statefuls: Sequence[tuple[str, Any, Any]], given_up_at: str
) -> str:
    """Whether a state that was too deep to walk goes in circles, and where."""
    inner = {id(stateful): captured for _, stateful, captured in statefuls}
    done: dict[int, Any] = {}  # the objects too: one that is made anew at each look would get the same id
    path: dict[int, str] = {id(state): "the state itself"}
    above: list[tuple[int, str, Iterator[tuple[object, Any]]]] = [(id(state), "", iter(state.items()))]
    while above:
        mine, name, entries = above[-1]
        key, value = next(entries, (None, above))
        if value is above:
            above.pop()
            del path[mine]
            continue
        below = name if key is None else f"{name}.{text_of(key)}" if name else text_of(key)
        if (first := path.get(id(value))) is not None:
            return f"{_shortened(below)} is circular: it is {_shortened(first)} once more"
        # each container once: some refer to the same ones so often that their paths are without number
        children = _children(value, inner)
        if children is not None and id(value) not in done:
            # a container that makes its content anew at each look goes on for ever without a circle
            if len(above) > MAX_DEPTH:
                given_up_at = below
                break
            done[id(value)] = value
            path[id(value)] = below
            above.append((id(value), below, iter(children)))
    return (
        f"{_shortened(given_up_at)}: containers lie in one another more than {MAX_DEPTH} deep, or deeper "
        "than this thread's calls leave room for; flatten them, or give the state an object that packs them "
        "in its state_dict()"
    )


def _children(value: Any, inner: Mapping[int, Any]) -> Iterable[tuple[object, Any]] | None:
    """(key, value) of all that lies in a container; key None for what lies at the same name."""
    if isinstance(value, torch.Tensor):
        return None
    if id(value) in inner:
        return [(None, inner[id(value)])]
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, (PerRank, FromRank)):
        return [(None, value.value)]
    return enumerate(value) if isinstance(value, (list, tuple)) else None
