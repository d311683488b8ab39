"""What an object holds, looked at from outside: memory that a load may fill, modules that may resize.

Enters: an object of the trainer's, of which nothing is called. Leaves: answers. Only attributes are looked
at, and what lies in containers that are attributes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.optim import Optimizer

from .materialise import canonical

_MAX_ENTRIES = 1000
"""Of a container: what is longer is data."""
_FIXED = ("torch.nn.", "torch.distributed.")
"""Where ``_load_from_state_dict`` and hooks come from that rename and convert, but never resize."""


def _attributes(thing: object) -> Iterator[Any]:
    yield from list(getattr(thing, "__dict__", {}).values())
    for cls in type(thing).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(thing, name):
                yield getattr(thing, name)


def _held(thing: object) -> Iterator[Any]:
    for value in _attributes(thing):
        yield value
        if isinstance(value, Mapping):
            yield from islice(value.values(), _MAX_ENTRIES)
        elif isinstance(value, (list, tuple, set)):
            yield from islice(value, _MAX_ENTRIES)


def holds_memory_for(thing: object, wanted: Collection[tuple[torch.Size, torch.dtype]]) -> bool:
    """Whether ``thing`` holds a module, an optimizer, a distributed tensor, or one of a ``wanted`` shape and
    dtype."""
    for value in _held(thing):
        if isinstance(value, (torch.nn.Module, Optimizer, DTensor)):
            return True
        if isinstance(value, torch.Tensor) and (value.shape, value.dtype) in wanted:
            return True
    return False


def memory_of_modules(thing: object) -> set[int]:
    """Addresses of the parameters and buffers of the modules that ``thing`` holds."""
    found: set[int] = set()
    for value in _held(thing):
        if isinstance(value, torch.nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                if type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                    found.add(tensor.data_ptr())
    found.discard(0)
    return found


def resizable_owners(module: torch.nn.Module) -> set[str]:
    """Names of the submodules that load in a way of their own, and so may take a tensor of another shape, or
    one that they lack: those whose class overrides ``_load_from_state_dict`` or that have a pre-hook for it.
    What torch has of these for wrappers and older checkpoints resizes nothing; lazy modules do."""
    found: set[str] = set()
    for name, owner in module.named_modules():
        if _loads_by_itself(owner):
            found |= {name, canonical(module, name)}
    return found


def _loads_by_itself(owner: torch.nn.Module) -> bool:
    if isinstance(owner, LazyModuleMixin) and owner.has_uninitialized_params():
        return True
    hooks = [getattr(hook, "hook", hook) for hook in owner._load_state_dict_pre_hooks.values()]
    return any(
        not str(getattr(getattr(fn, "func", fn), "__module__", "")).startswith(_FIXED)
        for fn in (type(owner)._load_from_state_dict, *hooks)
    )
