"""Modules on the meta device get memory: their parameters and buffers become the tensors that were read.

Enters: a module and fresh tensors by name. Leaves: the same Parameter objects with bytes behind them, so that
ties and an optimizer made before stay connected. Tensors that nothing was read for stay on the meta device.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

logger = logging.getLogger(__name__)

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""What compiling, activation checkpointing and FSDP put into a module's names."""


def below(prefix: str, values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among ``values`` that lie below ``prefix``, by their names from there on."""
    head = f"{prefix}."
    return {
        name.removeprefix(head): value
        for name, value in values.items()
        if name.startswith(head) and isinstance(value, torch.Tensor)
    }


def canonical(module: torch.nn.Module, name: str) -> str:
    """``name`` in ``module`` without what wrappers put into it."""
    if isinstance(module, DistributedDataParallel):
        name = name.removeprefix("module.")
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def materialise(module: torch.nn.Module, fresh: Mapping[str, torch.Tensor]) -> None:
    """Put ``fresh`` in place of the module's tensors of these names that are on the meta device."""
    left = []
    for path, owner in list(module.named_modules()):
        for slots in (owner._parameters, owner._buffers):
            for name, tensor in list(slots.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                full = f"{path}.{name}" if path else name
                read = fresh.get(full, fresh.get(canonical(module, full)))
                if read is not None and read.shape == tensor.shape:
                    _replace(module, tensor, read)
                elif name in owner._non_persistent_buffers_set:
                    left.append(full)
    if left and fresh:
        logger.warning(
            "%s: these buffers are not persistent, so no checkpoint holds them, and stay on the meta "
            "device: %s; compute them anew before the first forward",
            *(type(module).__name__, ", ".join(left)),
        )


def _replace(module: torch.nn.Module, old: torch.Tensor, fresh: torch.Tensor) -> None:
    made = fresh.detach()  # an object of its own: a swap gives it the old one's place
    if isinstance(old, torch.nn.Parameter):
        made = torch.nn.Parameter(made, requires_grad=old.requires_grad)
    made.__dict__.update(old.__dict__)
    try:
        torch.utils.swap_tensors(old, made)  # type: ignore[no-untyped-call]  # torch has no annotation
    except RuntimeError:  # something else holds on to the old one's memory: only its places can change
        for owner in module.modules():
            for slots in (owner._parameters, owner._buffers):
                for name, tensor in slots.items():
                    if tensor is old:
                        slots[name] = made  # type: ignore[assignment]  # a parameter goes where one was
