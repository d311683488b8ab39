"""Whom a load asks for its state: by what a checkpoint holds at a name, and what the live object may.

Enters: an opened checkpoint, and Statefuls at their names. Leaves: what a Stateful gave, or UNASKED.
Invariant: a Stateful is asked for its ``state_dict()`` once at most in a load, and only if it may hold memory
for what was saved: to some, being asked is a change. Source: docs/adr/0020.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata
from torch.optim import Optimizer

from ..formats import Tree, children_of, heads_of, is_of_stateful, kind_of, leaf_names, locate
from .asking import UNASKED, ask_in_order, snapshot
from .holdings import holds_memory_for, holds_objects, holds_what_stock_changes
from .stateful import AppState, PerRank

_DOUBTFUL_STARTS = tuple("0123456789-(<")
_DOUBTFUL = ("None", "True", "False", "inf", "nan")


class _Contents(Protocol):
    @property
    def names(self) -> Mapping[str, TensorStorageMetadata | BytesStorageMetadata]: ...

    @property
    def structure(self) -> Tree: ...

    @property
    def manifest(self) -> object: ...


class Schema:
    """What a checkpoint holds at and below a name."""

    def __init__(self, contents: _Contents) -> None:
        self._contents = contents

    @cached_property
    def _names(self) -> Mapping[str, TensorStorageMetadata | BytesStorageMetadata]:
        return self._contents.names

    @cached_property
    def _structure(self) -> Tree:
        return self._contents.structure

    def needs_memory(self, name: str, stateful: Any) -> bool:
        """Whether ``stateful``, which lies at ``name``, is to be asked for its state.

        It is where it seems to hold memory to read into, for distributed tensors, for objects inside of its
        state, and where the checkpoint does not tell what was saved: stock drops empty containers, kinds of
        mappings, of keys and of tensors, and older releases do not say what was an object. Where nothing was
        saved it says whether anything is missing.
        """
        was_saved, node = locate(self._structure, name)
        if not was_saved:
            return not self._is_of_other_ranks(name)
        # stock's: it wrote names alone
        if self._contents.manifest is None:
            if _has_doubtful_key(node) or holds_what_stock_changes(stateful):
                return True
        # an older release's, or no mapping: nothing says where objects were
        elif node is not None and not is_of_stateful(node):
            if holds_objects(stateful):
                return True
        elif _has_stateful_below(node):
            return True
        saved: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for leaf in leaf_names(node, name):
            meta = self._names[leaf]
            if isinstance(meta, TensorStorageMetadata):
                # of several ranks: only the live tensor says which part belongs here
                if len(meta.chunks) != 1:
                    return True
                saved[leaf] = (meta.size, meta.properties.dtype)
        return bool(saved) and holds_memory_for(stateful, saved)

    def _is_of_other_ranks(self, name: str) -> bool:
        """Whether it lies in what each rank has for itself, of which others have saved theirs."""
        return any(
            head.rpartition(".")[2].startswith(PerRank.key(""))
            and locate(self._structure, head.rpartition(".")[0])[0]
            for head in heads_of(name)
        )


def _has_stateful_below(node: Tree) -> bool:
    return any(is_of_stateful(child) or _has_stateful_below(child) for _, child in children_of(node))


def _has_doubtful_key(node: Tree) -> bool:
    """Whether a key, of which stock writes the text, may have been a number, a tuple or None."""
    is_mapping = kind_of(node) != "list"
    # text is all that stock keeps of a key: whether "1" was a number only the live object knows
    return any(
        (is_mapping and (key[:1] in _DOUBTFUL_STARTS or key in _DOUBTFUL)) or _has_doubtful_key(child)
        for key, child in children_of(node)
    )


@dataclass(slots=True)
class Asked:
    """What Statefuls have given in one load, which may try several checkpoints. Keeps them alive."""

    _given: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    agreed: set[str] = field(default_factory=set)
    """Names of those that are asked because a rank needs it."""

    def ask(self, schema: Schema, name: str, stateful: Any, wishes: set[str] | None = None) -> Any:
        """What ``stateful`` gives, or UNASKED. With ``wishes`` it is asked only if that is agreed, and its
        name is put there if it needs to be. Raises CaptureError."""
        # by identity: under two names it is one object, to which being asked may be a change
        if id(stateful) not in self._given:
            # those three show what is filled in place, so there is no load without asking them
            always = isinstance(stateful, (torch.nn.Module, Optimizer, AppState)) or name in self.agreed
            if not always and schema.needs_memory(name, stateful):
                # not now: a state_dict() may run collectives, and the other ranks may not have to ask
                if wishes is not None:
                    wishes.add(name)
                else:
                    always = True
            if not always:
                return UNASKED
            self._given[id(stateful)] = (stateful, snapshot(name, stateful))
        return self._given[id(stateful)][1]


def wishes_of(state: Mapping[str, Any], schema: Schema, asked: Asked, *, rank: int) -> list[str]:
    """Ask whom all ranks agreed to ask, and give the names of others that this rank needs to: a
    ``state_dict()`` may run collectives, so all must ask the same. Raises CaptureError."""
    wishes: set[str] = set()

    def ask(name: str, stateful: Any) -> Any:
        return asked.ask(schema, name, stateful, wishes)

    ask_in_order(state, rank, {}, ask, is_load=True)
    return sorted(wishes)
