"""Leaves of stock's that hold what a state has as a container: taken apart into the names that it asks for.

Enters: a leaf's value and the names that are wanted. Leaves: Parts, by DCP's names. Pure. Until torch 2.3
containers without a tensor were leaves, and with ``flatten_state_dict=False`` all of them are. Invariant:
only what a state has as a container is taken apart, so ``read`` gives every leaf as it was saved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from .tree import heads_of

_MAX_DEPTH = 200
_MAX_TEXT = 256 << 20
_MIN_TEXT = 256
"""Bounds what is taken apart by the length of its names, and by what each of them costs besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What lay inside of a leaf."""

    path: tuple[str | int, ...]
    """As ``planner_data`` would have it: keys as text, indices of lists as numbers."""
    value: Any

    @property
    def meta(self) -> TensorStorageMetadata | BytesStorageMetadata:
        """As `.metadata` would describe it."""
        if not isinstance(self.value, torch.Tensor):
            return BytesStorageMetadata()
        properties = TensorProperties(dtype=self.value.dtype, layout=self.value.layout)
        return TensorStorageMetadata(properties=properties, size=self.value.size(), chunks=[])


def folded(leaves: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Those of ``leaves`` that lie above names that are ``wanted``."""
    above = {head for name in wanted for head in heads_of(name)}
    return [leaf for leaf in leaves if leaf in above and leaf not in wanted]


def take_apart(
    value: Any, name: str, path: tuple[str | int, ...], wanted: Collection[str]
) -> Iterator[tuple[str, Part]]:
    """(name, Part) of each value inside; mappings and lists are gone into unless they are ``wanted``
    themselves.

    Raises: ValueError for what goes in circles, has two values of one name, or grows without end, as
    containers do that hold one another many times.
    """
    found: set[str] = set()
    room = _MAX_TEXT
    above: list[Iterator[tuple[str | int, Any]]] = [iter(((path[-1], value),))]
    names = [""]
    paths = [path[:-1]]
    while above:
        try:
            entry = next(above[-1], None)
        except RecursionError:
            raise ValueError(f"{name} has a key that is nested too deep") from None
        if entry is None:
            above.pop()
            names.pop()
            paths.pop()
            continue
        key, child = entry
        at = f"{names[-1]}.{key}" if len(above) > 1 else name
        room -= len(at) + _MIN_TEXT
        if room < 0 or len(above) > _MAX_DEPTH:
            raise ValueError(f"{name} holds containers without end")
        if at in wanted or not isinstance(child, (Mapping, list)):
            if at in found:
                raise ValueError(f"{name} holds two values of the name {at}")
            found.add(at)
            yield at, Part(path=(*paths[-1], key), value=child)
            continue
        above.append(
            enumerate(child) if isinstance(child, list) else ((str(key), each) for key, each in child.items())
        )
        names.append(at)
        paths.append((*paths[-1], key))
