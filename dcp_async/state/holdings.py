"""What an object holds, looked at from outside: memory that a load may fill, modules that may resize.

Enters: an object of the trainer's, of which nothing is called. Leaves: answers. Only attributes are looked
at, and what lies in containers that are attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .containers import PLAIN_TENSORS
from .materialise import canonical
from .sharding import is_sharded
from .stateful import is_stateful

_MAX_ENTRIES = 1000
"""How much of a container is looked at: what is longer is data."""
_FIXED = ("torch.nn.", "torch.distributed.")
"""Where ``_load_from_state_dict`` and hooks come from that rename and convert, but never resize."""


def _is_object(value: object) -> bool:
    """Whether ``value`` is of a class of the trainer's, and no container."""
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, ModuleType, FunctionType, Mapping, list, tuple, set, torch.Tensor, torch.nn.Module)
    )


def _attributes(thing: object) -> Iterator[Any]:
    # a list: an attribute that another thread adds meanwhile would end the iteration with an error
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


def _nested(thing: object) -> Iterator[Any]:
    """What ``thing`` holds, and what lies in its mappings and lists at whatever depth: those that DCP names
    the entries of."""
    todo = list(_attributes(thing))
    seen: set[int] = set()
    while todo and len(seen) < _MAX_ENTRIES:
        value = todo.pop()
        yield value
        # containers may lie in circles
        if isinstance(value, (Mapping, list)) and id(value) not in seen:
            seen.add(id(value))
            todo += islice(value.values() if isinstance(value, Mapping) else value, _MAX_ENTRIES)


def holds_memory_for(thing: object, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> bool:
    """Whether ``thing`` holds, itself or in a module or an optimizer, a tensor of the shape and dtype of a
    ``saved`` one, or a distributed tensor; or a module with a tensor of one's name, whose shape must fit.
    Distributed ones are found at whatever depth, and one object further in as well."""
    wanted = set(saved.values())
    # by their ends: under which name an object shows its module is its own affair
    tails = {name[dot + 1 :] for name in saved for dot, letter in enumerate(name) if letter == "."}
    for value in _held(thing):
        for tensor in _tensors_in(value):
            if _is_distributed(tensor):
                return True
            # these raise where they are asked for their shape, and no load reads into them
            if is_lazy(tensor) or tensor.is_nested:
                continue
            if (tensor.shape, tensor.dtype) in wanted:
                return True
        if isinstance(value, torch.nn.Module) and any(
            canonical(value, name) in tails for name, _ in value.named_parameters()
        ):
            return True
        if _is_object(value) and _holds_distributed(value):
            return True
    return _holds_distributed(thing)


def _holds_distributed(thing: object) -> bool:
    # unasked, it would be handed whole tensors in place of these
    return any(_is_distributed(tensor) for value in _nested(thing) for tensor in _tensors_in(value))


def holds_objects(thing: object) -> bool:
    """Whether ``thing`` holds a Stateful that it may show in its state: modules and optimizers are told
    by their tensors."""
    return any(
        is_stateful(value) and not isinstance(value, (torch.nn.Module, Optimizer)) for value in _held(thing)
    )


def holds_what_stock_changes(thing: object) -> bool:
    """Whether ``thing`` holds, at whatever depth, what stock's `.metadata` does not tell: an empty container,
    which it drops, a mapping other than a dict, or a tensor of a class of its own."""
    return any(map(_is_changed_by_stock, _nested(thing)))


def _is_changed_by_stock(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return type(value) not in PLAIN_TENSORS
    if isinstance(value, Mapping):
        return not value or type(value) is not dict
    return isinstance(value, list) and not value


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, torch.nn.Module):
        yield from value.parameters()
        yield from value.buffers()
    elif isinstance(value, Optimizer):
        for group in value.param_groups:
            yield from group["params"]


def _is_distributed(tensor: torch.Tensor) -> bool:
    # a FlatParameter of FSDP1 shows none of the shapes that it is made of
    return isinstance(tensor, DTensor) or is_sharded(tensor) or hasattr(tensor, "_is_flat_param")


def memory_of_modules(thing: object) -> set[int]:
    """Addresses of the parameters and buffers of the modules that ``thing`` holds."""
    addresses: set[int] = set()
    for value in _held(thing):
        if isinstance(value, torch.nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                # distributed tensors are strict by their kind; those of other classes may have no address
                if type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
                    addresses.add(tensor.data_ptr())
    # empty and meta tensors lie nowhere, so at 0 all of them would be taken for one of a module's
    addresses.discard(0)
    return addresses


def resizable_owners(module: torch.nn.Module) -> set[str]:
    """Names of the submodules that load in a way of their own, and so may take a tensor of another shape, or
    one that they lack: those whose class overrides ``_load_from_state_dict`` or that have a pre-hook for it.
    What torch has of these for wrappers and older checkpoints resizes nothing; lazy modules do."""
    owners: set[str] = set()
    for name, owner in module.named_modules():
        if _loads_by_itself(owner):
            owners |= {name, canonical(module, name)}
    return owners


def _loads_by_itself(owner: torch.nn.Module) -> bool:
    if isinstance(owner, LazyModuleMixin) and owner.has_uninitialized_params():
        return True
    # torch wraps its hooks, and the module of a partial would be functools
    hooks = [getattr(hook, "hook", hook) for hook in owner._load_state_dict_pre_hooks.values()]
    return any(
        not str(getattr(getattr(fn, "func", fn), "__module__", "")).startswith(_FIXED)
        for fn in (type(owner)._load_from_state_dict, *hooks)
    )
