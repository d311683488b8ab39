"""Canonical names: what a parameter is called when nothing wraps its module.

Enters: a module and names as its wrappers have them. Leaves: names without what DDP, FSDP, compiling and
activation checkpointing put into them. Invariant: the names that torch's ``get_state_dict`` writes, so that
files can be read with and without us.
Source: torch/distributed/checkpoint/state_dict.py (_get_fqns).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

_COMPILED = "_orig_mod"
_INSIDE: tuple[tuple[type[torch.nn.Module], str], ...] = (
    (DistributedDataParallel, "module"),
    (FullyShardedDataParallel, "_fsdp_wrapped_module"),
    (ActivationWrapper, "_checkpoint_wrapped_module"),
)
"""Kinds of wrappers, and what each calls the module inside."""


def _inside(module: torch.nn.Module) -> str | None:
    """What a wrapper calls the module that it wraps; None if this is no wrapper."""
    for kind, name in _INSIDE:
        if isinstance(module, kind):
            return name
    # not imported: that takes seconds, and nothing is compiled as long as nobody else has
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return _COMPILED if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def is_wrapped(module: torch.nn.Module) -> bool:
    """Whether a wrapper is anywhere in ``module``; if not, its names are canonical as they are."""
    return any(_inside(part) is not None for part in module.modules())


def canonical_name(module: torch.nn.Module, name: str) -> str:
    """``name``, as ``module`` has it, without the names that wrappers put in. What is no module's name stays:
    a module may save what it has no attribute for."""
    kept: list[str] = []
    owner: torch.nn.Module | None = module
    for part in name.split("."):
        # a name need not go through each wrapper: activation checkpointing takes its own out of names
        while owner is not None and (inside := _inside(owner)) is not None:
            owner = owner._modules.get(inside)
            if part == inside:
                break
        else:
            kept.append(part)
            # not getattr(): a module may save what it has no attribute for
            owner = owner._modules.get(part) if owner is not None else None
    return ".".join(kept)


def canonical_names(module: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> name as ``module`` has it, in order. Raises ValueError if two become one."""
    given = list(names)
    if not is_wrapped(module):
        return dict(zip(given, given, strict=True))
    original_of: dict[str, str] = {}
    for name in given:
        canonical = canonical_name(module, name)
        if canonical in original_of:
            raise ValueError(
                f"{original_of[canonical]!r} and {name!r} are both called {canonical!r} without their "
                "wrappers; rename one of the two"
            )
        original_of[canonical] = name
    return original_of


def parameter_names(module: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    """Each parameter's canonical names, the one that files have first; shared ones have several."""
    wrapped = is_wrapped(module)
    names: dict[torch.Tensor, list[str]] = {}
    # tied parameters have several names, and a file may have been written under any of them
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(canonical_name(module, name) if wrapped else name)
    return names
