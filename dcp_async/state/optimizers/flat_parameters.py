"""FSDP1: its optimizer state, which only its own functions can take out of flat parameters and put back.

Enters: a model with FSDP1 in it and an optimizer. Leaves: the optimizer's state by canonical names, or by
numbers. Invariant: names go to FSDP1 as it has them itself, whatever is wrapped inside of it.
Source: torch/distributed/fsdp/_optim_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict as _stock
from torch.distributed.checkpoint.state_dict import StateDictOptions, _verify_options
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _get_param_to_fqns
from torch.optim import Optimizer

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def _canonical(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_names(model: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    """Each parameter's canonical names; a flat one stands for several."""
    return {parameter: [_canonical(name) for name in names] for parameter, names in _own_names(model).items()}


def _own_names(model: torch.nn.Module) -> dict[torch.Tensor, list[str]]:
    names: dict[Any, list[str]] = {**_get_param_to_fqns(model)}
    return names


def context(model: torch.nn.Module, options: StateDictOptions) -> Any:
    """A context in which the model's own state is what ``options`` ask for."""
    return _verify_options(model, (), optim_only=False, options=options).fsdp_context()


def _options_for(model: torch.nn.Module, optimizers: Sequence[Optimizer], options: StateDictOptions) -> Any:
    # torch's own, for the context in it: that sets what kind of state FSDP1 gives
    return _verify_options(model, tuple(optimizers), optim_only=True, options=options)


def _process_group(model: torch.nn.Module, info: Any) -> Any:
    """What stock of this torch passes for ``group``: that of 2.11 passes none."""
    find = getattr(_stock, "_get_fsdp_process_group", None)
    return None if find is None else find(model, info)


def optimizer_state(
    model: torch.nn.Module, optimizers: Sequence[Optimizer], options: StateDictOptions
) -> dict[str, Any]:
    """One state of all optimizers by canonical names. Ranks: all must call it."""
    info = _options_for(model, optimizers, options)
    state: dict[str, Any] = {"state": {}, "param_groups": []}
    for optimizer in optimizers:
        # only in it does FSDP1 give the state in the form that the options ask for
        with info.fsdp_context():
            own = FullyShardedDataParallel.optim_state_dict(
                model, optimizer, optimizer.state_dict(), group=_process_group(model, info)
            )
        if own:  # empty on the ranks that a full state does not go to
            state["state"] |= {_canonical(str(name)): entry for name, entry in own["state"].items()}
            state["param_groups"] += [
                {**group, "params": [_canonical(name) for name in group["params"]]}
                for group in own["param_groups"]
            ]
    return state


def to_load(
    model: torch.nn.Module, optimizer: Optimizer, named: Mapping[str, Any], options: StateDictOptions
) -> dict[str, Any]:
    """``named``, by canonical names, as ``optimizer.load_state_dict`` takes it. Ranks: all must call it."""
    # FSDP1 looks entries up by names as it has them, wrappers of activation checkpointing included
    own = {_canonical(name): name for names in _own_names(model).values() for name in names}
    given = {
        "state": {own.get(name, name): dict(entry) for name, entry in named["state"].items()},
        "param_groups": [
            {**group, "params": [own.get(name, name) for name in group["params"]]}
            for group in named["param_groups"]
        ],
    }
    info = _options_for(model, (optimizer,), options)
    with info.fsdp_context():
        return FullyShardedDataParallel.optim_state_dict_to_load(
            model, optimizer, given, group=_process_group(model, info)
        )
