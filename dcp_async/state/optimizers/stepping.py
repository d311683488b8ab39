"""Which optimizers change tensors when something in a state steps, through any number of wrappers.

Enters: a Stateful. Leaves: the torch optimizers that it is, wraps or holds. Invariant: attributes are looked
up where they lie, so that no code of a wrapper runs; tensors and modules are not gone into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch.optim import Optimizer

_HOOKS = "_optimizer_step_pre_hooks"
_HOLDERS = frozenset(
    {
        *("optimizer", "_optimizer", "optim", "_optim", "optimizers", "_optimizers", "optims"),
        *("base_optimizer", "inner_optimizer", "wrapped_optimizer", "optim_map", "optim_dict"),
    }
)
"""Attributes under which wrappers, schedulers and containers keep an optimizer, whatever it looks like."""
_OWN = frozenset({"state", "param_groups", "defaults"})
"""What each optimizer has, and what may be large."""
_DATA = frozenset({int, float, str, bool, bytes, type(None)})
_LOOKED_AT = 64
"""Entries of a container that say whether optimizers lie in it: a list of samples may be long."""


def stepped_by(stateful: object) -> list[Optimizer]:
    """The optimizers whose ``step()`` a step of ``stateful`` may end up in, each once.

    An object counts as an optimizer if it steps and has groups of parameters. One that is a
    ``torch.optim.Optimizer`` but was never initialised as one has no hooks of its own: it wraps another.
    """
    optimizers: list[Optimizer] = []
    seen: set[int] = set()
    waiting: list[object] = [stateful]
    while waiting:
        value = waiting.pop()
        # wrappers may refer to one another
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Optimizer) and _HOOKS in value.__dict__:
            optimizers.append(value)
        waiting += _held(value)
    return optimizers


def _held(value: object) -> Iterator[object]:
    """What of the attributes of ``value`` is an optimizer, or may hold one."""
    for name, inner in _attributes(value):
        if name in _OWN or isinstance(inner, (torch.Tensor, torch.nn.Module, type)):
            continue
        if name in _HOLDERS:
            yield from _each(inner)
        elif isinstance(inner, (list, tuple, dict, set, frozenset)):
            # a glance: what is no container of optimizers may hold a million samples
            if any(map(_leads_on, islice(_each(inner), _LOOKED_AT))):
                yield from _each(inner)
        elif _leads_on(inner):
            yield inner


def _attributes(value: object) -> Iterable[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, torch.nn.Module)):
        return
    yield from list(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            try:
                # not getattr(): the __getattr__ of a wrapper may run code, or ask what it wraps
                yield name, object.__getattribute__(value, name)
            except AttributeError:  # not set, or under a mangled name
                continue


def _each(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)
    else:
        yield value


def _leads_on(value: object) -> bool:
    """Whether ``value`` is an optimizer, or has an attribute under which one is kept."""
    if type(value) in _DATA or isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        return False
    own = getattr(value, "__dict__", {})
    kind: Any = type(value)
    # known by its class: this is asked for each entry of a container that is looked at
    holds, steps, has_groups = _class_of(kind)
    return holds or any(map(own.__contains__, _HOLDERS)) or (steps and (has_groups or "param_groups" in own))


@lru_cache(maxsize=256)
def _class_of(kind: type) -> tuple[bool, bool, bool]:
    """Whether instances are optimizers or name one as an attribute, whether they step, and have groups."""
    holds = issubclass(kind, Optimizer) or any(hasattr(kind, name) for name in _HOLDERS)
    return holds, callable(getattr(kind, "step", None)), hasattr(kind, "param_groups")
