"""Match: how a state and a checkpoint fit, and what of each a load takes.

Enters: what matching found. Leaves: the same, to who plans the reads and hands values back. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..formats import Tree
from ..state import Region


@dataclass(slots=True, kw_only=True)
class Match:
    """How a state and a checkpoint fit."""

    tensors: dict[str, list[Region]] = field(default_factory=dict)
    """To be filled in place."""
    gappy: set[str] = field(default_factory=set)
    """Those of ``tensors`` that may not be contiguous."""
    offered: set[str] = field(default_factory=set)
    """Those of ``tensors`` that need not be filled: a new tensor does as well."""
    resized: set[str] = field(default_factory=set)
    """What is PerRank and was saved by another number of ranks: taken from all of them."""
    leaves: list[str] = field(default_factory=list)
    """To be replaced."""
    fresh: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors made by us, for what is taken as it was saved and in place of meta tensors."""
    nodes: dict[str, Tree] = field(default_factory=dict)
    """The trees of what is taken as it was saved, by name."""
    objects: dict[str, set[str]] = field(default_factory=dict)
    """Name of one of these trees -> the leaves in it that stand for Statefuls. No other does: what a Stateful
    gave may be a leaf itself, under its own name."""
    grown: dict[str, list[tuple[Any, str]]] = field(default_factory=dict)
    """Mapping -> (key, name) of what is taken below it and is not there."""
    like: dict[str, DTensor] = field(default_factory=dict)
    """Leaves that become distributed tensors -> one that lies as they shall."""
    replaced: dict[str, set[str]] = field(default_factory=dict)
    """Optimizers' mappings whose other entries go: mapping -> names of the entries that were saved."""
    absent: set[str] = field(default_factory=set)
    """Statefuls of which nothing was saved: they are not called."""
    kept: list[str] = field(default_factory=list)
    """Options of optimizers that were not saved and stay as they are: reported, but no misfit."""
    aliases: list[list[tuple[str, Region]]] = field(default_factory=list)
    """Targets that share memory, though what is read into them may differ."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    """Why names mismatch, in words."""
    convertible: bool = False
    """Whether dtypes="convert" would help some of them."""

    def mismatch(self, name: str, reason: str) -> None:
        """``name`` does not fit because it ``reason``."""
        self.mismatched.append(name)
        self.reasons.append(f"{name} {reason}")
