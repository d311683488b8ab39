"""What an optimizer was given, it has: the load of one optimizer, compared with what was saved.

Enters: an optimizer and a state by its parameters' numbers. Leaves: that state in the optimizer, entry by
entry, or an error that names what is not. Invariant: the base class's own casts lose nothing; code of the
optimizer's own may change values, but not lose an entry.
Source: torch/optim/optimizer.py (load_state_dict).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_PARAMS = "params"
_NAMES = "param_names"
_STATE = "state"
_GROUPS = "param_groups"
_STEP = "step"
"""The one entry that ``Optimizer.load_state_dict`` does not cast to its parameter's dtype."""
_CHEAP_BYTES = 64 * 1024
"""Up to here tensors are compared bit by bit."""


def few(names: Iterable[str]) -> str:
    """The first of ``names``, and how many more."""
    given = list(names)
    return ", ".join(given[:5]) + (f" and {len(given) - 5} more" if len(given) > 5 else "")


def is_custom(optimizer: Optimizer) -> bool:
    """Whether somebody else's code has a say in what is loaded."""
    load = getattr(type(optimizer), "load_state_dict", None)
    hooks = (
        getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", None),
        getattr(optimizer, "_optimizer_load_state_dict_post_hooks", None),
    )
    return load is not Optimizer.load_state_dict or any(hooks) or "load_state_dict" in vars(optimizer)


def load_optimizer(optimizer: Optimizer, state: Any, *, exact: bool = True) -> None:
    """Hand ``state``, by numbers, to ``optimizer``, which then has just that.

    ``Optimizer.load_state_dict`` casts entries to their parameter's dtype, and turns text into what it is
    not; both are put right again. An option that was not saved stays as it is.

    Args:
        exact: whether an entry keeps its saved dtype where its parameter has another.
    Raises: ValueError if the optimizer, by code of its own, lost an entry; what its ``load_state_dict``
        raises.
    """
    if not (isinstance(state, Mapping) and isinstance(state.get(_STATE), Mapping) and _GROUPS in state):
        optimizer.load_state_dict(state)  # a form of the optimizer's own
        return
    given = dict(state)
    groups = given[_GROUPS]
    if isinstance(groups, list) and len(groups) == len(optimizer.param_groups):
        # torch replaces groups whole: an option that was not saved would be gone, and step() a KeyError
        given[_GROUPS] = [
            {**{key: value for key, value in live.items() if key not in (_PARAMS, _NAMES)}, **group}
            for live, group in zip(optimizer.param_groups, groups, strict=True)
        ]
    # aside: hooks of the optimizer's own may take out of what they are handed
    expected = dict(given[_STATE])
    optimizer.load_state_dict(given)
    differing = compare_after(optimizer, {**given, _STATE: expected}, exact=exact)
    if differing:
        raise ValueError(
            f"{type(optimizer).__name__}.load_state_dict() did not take what was saved: "
            f"{'; '.join(differing[:5])}"
        )


def compare_after(optimizer: Optimizer, state: Mapping[str, Any], *, exact: bool = True) -> list[str]:
    """What of ``state`` is not in ``optimizer`` now, in words.

    What the base class itself changed on the way is put right first; code of the optimizer's own may change
    values and options, but not lose an entry.
    """
    custom = is_custom(optimizer)
    live: Mapping[Any, Any] = optimizer.state
    parameters: dict[int, torch.Tensor] = {}
    for group, saved in zip(optimizer.param_groups, state.get(_GROUPS, ()), strict=False):
        parameters |= dict(zip(saved[_PARAMS], group[_PARAMS], strict=False))
    differing: list[str] = []
    taken = set()
    for number, entry in state.get(_STATE, {}).items():
        parameter = parameters.get(number, number)
        taken.add(parameter)
        where = f"state[{number}]"
        if parameter not in live:
            if entry or not isinstance(entry, dict):  # an empty one says nothing
                differing.append(f"{where} is gone")
        elif not isinstance(entry, dict) or not isinstance(live[parameter], dict):
            continue
        elif lost := [key for key in entry if key not in live[parameter]]:
            differing.append(f"{where} has no {few(map(str, lost))}")
        elif not custom:
            own = parameter if isinstance(parameter, torch.Tensor) else None
            for key, value in entry.items():
                live[parameter][key] = _put_right(live[parameter][key], value, own, key, exact)
                if not same_value(live[parameter][key], value, exact=exact):
                    differing.append(
                        f"{where}[{key!r}] is {_said(live[parameter][key])}, saved {_said(value)}"
                    )
    if not custom:
        differing += [f"state of {key} was not saved" for key in _strangers(live, taken, parameters)]
        for number, (group, saved) in enumerate(
            zip(optimizer.param_groups, state.get(_GROUPS, ()), strict=False)
        ):
            for key, value in saved.items():
                if key != _PARAMS and not (key in group and same_value(group[key], value)):
                    differing.append(f"group {number} has {key}={group.get(key)!r}, saved {value!r}")
    return differing


def _strangers(
    live: Mapping[Any, Any], taken: Collection[Any], parameters: Mapping[int, torch.Tensor]
) -> list[str]:
    numbers = {parameter: number for number, parameter in parameters.items()}
    return [str(numbers.get(key, "another parameter")) for key in live if key not in taken and live[key]]


def _put_right(value: Any, saved: Any, parameter: torch.Tensor | None, key: Any, exact: bool) -> Any:
    """``saved``, where ``Optimizer.load_state_dict`` made ``value`` of it by its policy alone."""
    if isinstance(saved, torch.Tensor):
        cast = (
            exact
            and key != _STEP
            and isinstance(value, torch.Tensor)
            and parameter is not None
            and value.dtype != saved.dtype
            # to any other dtype it was not torch's policy that cast it
            and value.dtype == parameter.dtype
        )
        return saved.to(value.device) if cast else value
    if isinstance(saved, dict) and isinstance(value, dict):
        return {
            inner: _put_right(value[inner], entry, parameter, inner, exact) if inner in value else entry
            for inner, entry in saved.items()
        }
    if isinstance(saved, (list, tuple)) and type(saved) is type(value) and len(saved) == len(value):
        inside = [
            _put_right(own, entry, parameter, None, exact) for own, entry in zip(value, saved, strict=True)
        ]
        return (
            value if all(new is old for new, old in zip(inside, value, strict=True)) else type(saved)(inside)
        )
    if isinstance(saved, (str, bytes, bytearray)):
        return saved  # taken for a sequence, and made of a generator
    return value


def _said(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    text = repr(value)
    return text if len(text) <= 80 else f"a {type(value).__name__}"


def same_value(value: Any, saved: Any, *, exact: bool = True) -> bool:
    """Whether two values of an optimizer are equal, as far as that is cheap to tell."""
    if value is saved:
        return True
    if isinstance(saved, torch.Tensor) and isinstance(value, torch.Tensor):
        return _same_tensor(value, saved, exact=exact)
    if isinstance(saved, torch.Tensor) or isinstance(value, torch.Tensor):
        number, tensor = (value, saved) if isinstance(saved, torch.Tensor) else (saved, value)
        # older torch counted steps in numbers
        return isinstance(number, (int, float)) and tensor.numel() == 1 and tensor.item() == number
    if isinstance(saved, Mapping) and isinstance(value, Mapping):
        return value.keys() == saved.keys() and all(
            same_value(value[k], saved[k], exact=exact) for k in saved
        )
    if isinstance(saved, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(saved) and all(
            same_value(own, other, exact=exact) for own, other in zip(value, saved, strict=True)
        )
    try:
        return bool(value == saved) or bool(value != value and saved != saved)
    except (ValueError, TypeError, RuntimeError):  # an array, for one: nothing that can be told in a word
        return type(value) is type(saved)


def _same_tensor(value: torch.Tensor, saved: torch.Tensor, *, exact: bool) -> bool:
    if isinstance(value, DTensor) and isinstance(saved, DTensor):
        value, saved = value._local_tensor, saved._local_tensor
    if value.shape != saved.shape:
        return False
    if value.dtype != saved.dtype:
        # a fused optimizer counts its steps in float32, whatever they were counted in
        return not exact or (value.numel() == 1 and bool(value == saved))
    plain = type(value) is type(saved) and type(value) in (torch.Tensor, torch.nn.Parameter)
    # a load that compared everything would read its memory once more
    if not plain or value.device != saved.device or value.nbytes > _CHEAP_BYTES or value.is_meta:
        return True
    if value.layout is not torch.strided:
        return True
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (value, saved)]
    return torch.equal(*bits)
