"""Tensor subclasses around other tensors (``__tensor_flatten__``), as quantized optimizer states are: how one
is filled, cut and put together by its inner tensors.

Enters: a target and a tensor that was read, both of one class. Leaves: pairs of inner tensors to be copied,
or ValueError that says why they do not fit. Invariant: nothing is converted or quantized anew, and nothing is
written where the class would not see it.
Source: torch/utils/_python_dispatch.py; torchao/optim/subclass_8bit.py for what slicing has to look like.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._geometry import Box, box_at, extents, slices

Pair = tuple[torch.Tensor, torch.Tensor]
"""(target, source)"""


def is_wrapper(value: object) -> bool:
    """Whether ``value`` is a tensor that is made of others."""
    return is_traceable_wrapper_subclass(value)


def _parts(tensor: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Its inner tensors by name, and what else it is made with."""
    names, context = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, context


def part_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """``box`` of ``tensor``. Raises ValueError if its class can't cut there."""
    # a class that can't be cut need not be where all of it is wanted
    if extents(box) == tuple(tensor.shape):
        return tensor
    try:
        part: torch.Tensor = tensor[slices(box)]
    except Exception as error:  # the class's own code, which may raise anything
        raise ValueError(f"a {type(tensor).__name__} can't be cut there ({error})") from error
    if type(part) is not type(tensor) or tuple(part.shape) != extents(box):
        raise ValueError(f"a {type(tensor).__name__} can't be cut: a part of it is a {type(part).__name__}")
    return part


def pairs(target: torch.Tensor, box: Box, value: torch.Tensor, part: Box) -> list[Pair]:
    """What to copy so that ``box`` of ``target`` is what ``part`` of ``value`` is.

    Raises: ValueError for another class, or one that can't be cut so; and where they were made with other
    settings.
    """
    if type(value) is not type(target):
        raise ValueError(
            f"a {type(target).__name__} in the state, a {type(value).__name__} in the checkpoint"
        )
    place, source = part_of(target, box), part_of(value, part)
    whole = place is target and source is value
    mine, settings = _parts(place)
    others, other_settings = _parts(source)
    # a class may forget settings when it is cut
    if mine.keys() != others.keys() or (whole and not _equal(settings, other_settings)):
        raise ValueError(f"a {type(target).__name__} with {settings} in the state, {other_settings} there")
    owned = _parts(target)[0]
    copies: list[Pair] = []
    for name, inner in mine.items():
        other = others[name]
        if is_wrapper(inner) and is_wrapper(other):
            everything = box_at((0,) * inner.dim(), inner.shape)
            copies += pairs(inner, everything, other, everything)
        elif inner.shape != other.shape or inner.dtype != other.dtype:
            live, saved = f"{tuple(inner.shape)} {inner.dtype}", f"{tuple(other.shape)} {other.dtype}"
            raise ValueError(f"its {name} is {live} in the state, {saved} in the checkpoint")
        elif _is_view(inner, owned[name]):
            copies.append((inner, other))
        elif not _same_bytes(inner, other):  # a table that all parts share, or a copy that nobody would see
            raise ValueError(f"its {name} is another in the checkpoint, which a part of it can't take over")
    return copies


def _equal(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except Exception:  # settings of any class
        return False


def _same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether they are equal, of any dtype: torch compares no float8."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    # what was read lies in host memory, and what it is compared with perhaps on a device
    one, other = (tensor.cpu().reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right))
    return torch.equal(one, other)


def _is_view(part: torch.Tensor, whole: torch.Tensor) -> bool:
    return part is whole or part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts along dimension 0 as one tensor of their class, with memory of its own.

    Raises: ValueError if the class does not show how: cutting what was joined must give the parts again.
    """
    first = parts[0]
    if len(parts) == 1:
        return first.clone() if not is_wrapper(first) else _made(first, _parts(first)[0], first.shape[0])
    if not all(is_wrapper(part) and type(part) is type(first) for part in parts):
        raise ValueError(f"a {type(first).__name__} can't be put together from parts")
    inner = [_parts(part)[0] for part in parts]
    # which inner tensors grow with the rows, and which are tables, no class says: all ways are tried
    choices = [_choices(name, parts, inner) for name in inner[0]]
    rows = sum(part.shape[0] for part in parts)
    for chosen in itertools.product(*choices):
        try:
            # the proof: cut again, it must give back what it was made of
            made = _made(first, dict(zip(inner[0], chosen, strict=True)), rows)
            if _gives_back(made, parts):
                return made
        except Exception:  # the class's own checks: this is not how it is put together
            continue
    raise ValueError(f"a {type(first).__name__} can't be put together from {len(parts)} parts")


def _choices(
    name: str, parts: Sequence[torch.Tensor], inner: Sequence[Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """What ``name`` may be in the whole: its tensors side by side, if its length goes with that of its part;
    or one for all, if they are equal."""
    mine = [tensor[name] for tensor in inner]
    first = mine[0]
    choices = []
    if first.dim() and all(
        tensor.shape[1:] == first.shape[1:]
        and tensor.shape[0] * parts[0].shape[0] == first.shape[0] * part.shape[0]
        for tensor, part in zip(mine, parts, strict=True)
    ):
        choices.append(torch.cat(list(mine)))
    if all(tensor.shape == first.shape and _same_bytes(tensor, first) for tensor in mine):
        choices.append(first)
    return choices


def _made(like: Any, inner: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
    size = torch.Size((rows, *like.shape[1:]))
    stride = torch.empty(size, device="meta").stride()
    copies = {name: tensor.clone() for name, tensor in inner.items()}
    made: torch.Tensor = type(like).__tensor_unflatten__(copies, _parts(like)[1], size, stride)
    return made


def _gives_back(made: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    if made.shape[1:] != parts[0].shape[1:]:
        return False
    start = 0
    for part in parts:
        box = box_at((start, *(0,) * (part.dim() - 1)), part.shape)
        again, expected = _parts(part_of(made, box))[0], _parts(part)[0]
        if not all(_same_bytes(again[name], expected[name]) for name in expected):
            return False
        start += part.shape[0]
    return True
