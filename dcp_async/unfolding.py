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
    above = {name[:at] for name in wanted for at, letter in enumerate(name) if letter == "."}
    return [leaf for leaf in leaves if leaf in above and leaf not in wanted]


def take_apart(
    value: Any, name: str, path: tuple[str | int, ...], wanted: Collection[str]
) -> Iterator[tuple[str, Part]]:
    """(name, Part) of each value inside; mappings and lists are gone into unless they are ``wanted``
    themselves."""
    if name in wanted or not isinstance(value, (Mapping, list)):
        yield name, Part(path=path, value=value)
        return
    items: Iterable[tuple[str | int, Any]] = (
        enumerate(value) if isinstance(value, list) else ((str(key), child) for key, child in value.items())
    )
    for key, child in items:
        yield from take_apart(child, f"{name}.{key}", (*path, key), wanted)
