"""Every kind of object that a state may hold, changed since it was saved; a page says what a load does.

Nothing in the tables is written by hand but the names: each row is found out by saving one object and loading
it into another, strictly and not. To write the page anew:

    python -m tests.support.changed_shapes > docs/reference/changed-shapes.md
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcp_async import AppState, IncompatibleStateError, LoadError, sync
from dcp_async.errors import UntrustedCheckpointError
from tests.property.states import difference

INTRODUCTION = """\
# What changed since it was saved

What `load` does with an object that has another shape now than when it was saved: training made it grow, or
the code is another. `tests/support/changed_shapes.py` writes this page: it saves one, loads it into the
other, and looks. A test compares the page with what it finds.

The rule: **the checkpoint is the schema**. An object with a `state_dict()` gets what *it* saved, whole,
whatever it holds now; its own tensors are memory to read into where shape and dtype agree. What is yours to
shape, your containers and a module's parameters and buffers, keeps its names and shapes.

- **The checkpoint's**: the object holds exactly what was saved.
- **Refused**: an `IncompatibleStateError` that names it, before the first byte; nothing was touched.
- **Its own**: the object stays as it was; the report's `missing`, `unexpected` or `mismatched` names it.
- **What fits**: the object keeps its shape, and takes the values that fit; the report names the others.

With `strict=False` a Stateful of which nothing was saved is not called, and is reported as missing.
"""


class Keeper:
    """An object with a ``state_dict()``."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def state_dict(self) -> Any:
        return {"kept": self.kept}

    def load_state_dict(self, state: Any) -> None:
        self.kept = state["kept"]


class Buffers(nn.Module):
    """Has what it is given as parameters and buffers."""

    def __init__(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        super().__init__()
        self.register_buffer("always", torch.zeros(1))
        for name, tensor in tensors.items():
            if name.startswith("w"):
                self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)


class Resizes(Buffers):
    """Takes whatever is saved of it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        for key in list(state_dict):
            if key.startswith(prefix):
                self.register_buffer(key.removeprefix(prefix), torch.empty_like(state_dict[key]))
        for name in list(self._buffers):
            if f"{prefix}{name}" not in state_dict:
                self.register_buffer(name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class Extra(nn.Module):
    """Has extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def _optimizer(options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """``steps`` taken with so many parameters, and options of a group."""
    torch.manual_seed(1)
    given = dict(options)
    steps, count, length = given.pop("steps", 0), given.pop("count", 2), given.pop("length", 3)
    parameters = [nn.Parameter(torch.ones(length)) for _ in range(count)]
    optimizer = torch.optim.SGD(parameters, lr=given.pop("lr", 0.1), momentum=0.9)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    for name, value in given.items():
        if value is None:
            del optimizer.param_groups[0][name]
        else:
            optimizer.param_groups[0][name] = value
    return optimizer


def _ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


VALUES: dict[str, tuple[Any, Any]] = {
    "a `dict` has more keys": ({"a": 0}, {"a": 1, "b": _ones(2)}),
    "a `dict` has fewer keys": ({"a": 0, "b": torch.zeros(2)}, {"a": 1}),
    "a `list` of tensors grew": ([torch.zeros(2)], [_ones(2), _ones(3)]),
    "a `list` of tensors shrank": ([torch.zeros(2), torch.zeros(3)], [_ones(2)]),
    "an empty `list` has tensors": ([], [_ones(2)]),
    "a `list` of numbers grew": ([0], [1, 2]),
    "`None` is a tensor": (None, _ones(2)),
    "`None` is a `dict`": (None, {"a": 1, "b": _ones(2)}),
    "`None` is a number": (None, 1),
    "a tensor is `None`": (torch.zeros(2), None),
    "a `dict` is `None`": ({"a": 0}, None),
    "a number is a tensor": (0.5, _ones()),
    "a tensor has another length": (torch.zeros(2), _ones(5)),
    "a tensor has another dtype": (torch.zeros(2), _ones(2, dtype=torch.int64)),
}
TENSORS: dict[str, tuple[Any, Any]] = {
    "one more buffer": ({"b0": torch.zeros(2)}, {"b0": _ones(2), "b1": _ones(2)}),
    "one buffer less": ({"b0": torch.zeros(2), "b1": torch.zeros(2)}, {"b0": _ones(2)}),
    "a buffer was `None`": ({"b0": None}, {"b0": _ones(2)}),
    "a buffer is `None` now": ({"b0": torch.zeros(2)}, {"b0": None}),
    "a buffer has another length": ({"b0": torch.zeros(2)}, {"b0": _ones(5)}),
    "a buffer has another dtype": ({"b0": torch.zeros(2)}, {"b0": _ones(2, dtype=torch.int64)}),
}
PARAMETERS = {
    change.replace("buffer", "parameter"): tuple(
        {name.replace("b", "w"): tensor for name, tensor in tensors.items()} for tensors in pair
    )
    for change, pair in TENSORS.items()
    if "dtype" not in change
}
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "it had taken steps, it has none": ({}, {"steps": 2}),
    "it had taken none, it has steps": ({"steps": 2}, {}),
    "an option that a scheduler put there": ({}, {"initial_lr": 0.3, "max_lr": 0.5}),
    "an option that was not saved": ({"future": 1}, {"lr": 0.5}),
    "a number is a tensor": ({"lr": 0.1}, {"lr": torch.tensor(0.5)}),
    "another number of parameters": ({"count": 1, "steps": 1}, {"count": 2, "steps": 2}),
    "parameters of another length": ({"steps": 1}, {"steps": 2, "length": 4}),
}


@dataclass(frozen=True, kw_only=True)
class Group:
    title: str
    make: Callable[[Any], Any]
    """What is put into the state, of a value."""
    look: Callable[[Any], Any]
    """What of it can be compared, as it is then."""
    changes: Mapping[str, tuple[Any, ...]]


def _state_of(stateful: Any) -> Any:
    return copy.deepcopy(stateful.state_dict())


GROUPS = [
    Group(title="A Stateful: any object with a `state_dict()`", make=Keeper, look=_state_of, changes=VALUES),
    Group(title="A module: its `_extra_state`", make=Extra, look=_state_of, changes=VALUES),
    Group(title="A module: its parameters", make=Buffers, look=_state_of, changes=PARAMETERS),
    Group(title="A module: its buffers", make=Buffers, look=_state_of, changes=TENSORS),
    Group(
        title="A module in an `AppState`",
        make=lambda tensors: AppState(Buffers(tensors)),
        look=lambda app: _state_of(app.model),
        changes=TENSORS,
    ),
    Group(
        title="A module that overrides `_load_from_state_dict`, or has a pre-hook",
        make=Resizes,
        look=_state_of,
        changes=TENSORS,
    ),
    Group(title="An optimizer", make=_optimizer, look=_state_of, changes=OPTIMIZERS),
    Group(
        title="A container of yours",
        make=lambda value: {"kept": value},
        look=copy.deepcopy,
        changes=VALUES,
    ),
]


@dataclass(frozen=True)
class Row:
    change: str
    strict: str
    lenient: str

    def __str__(self) -> str:
        return f"| {self.change} | {self.strict} | {self.lenient} |"


def _same(left: Any, right: Any) -> bool:
    try:
        return difference(left, right) is None
    except Exception:  # another structure
        return False


def _outcome(group: Group, pair: tuple[Any, ...], root: Path, *, strict: bool) -> str:
    fresh = group.make(copy.deepcopy(pair[0]))
    before, saved = group.look(fresh), group.look(group.make(copy.deepcopy(pair[1])))
    with sync.CheckpointEngine(root) as engine:
        try:
            report = engine.load({"x": fresh}, strict=strict)
        except IncompatibleStateError:
            assert _same(group.look(fresh), before), "a refusal touches nothing"
            return "refused"
        except UntrustedCheckpointError:
            raise
        except LoadError as error:
            return f"`LoadError`: {type(error.__cause__).__name__} of its own"
    lists = [name for name in ("missing", "unexpected", "mismatched") if getattr(report, name)]
    found = group.look(fresh)
    if _same(found, saved):
        outcome = "the checkpoint's"
    else:
        outcome = "its own" if _same(found, before) else "what fits"
    return f"{outcome} ({', '.join(lists)})" if lists else outcome


def tables() -> dict[str, list[Row]]:
    """What is found out about every change."""
    found: dict[str, list[Row]] = {}
    for group in GROUPS:
        rows = found[group.title] = []
        for change, pair in group.changes.items():
            with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                root = Path(name)
                with sync.CheckpointEngine(root) as engine:
                    engine.save({"x": group.make(copy.deepcopy(pair[1]))})
                outcomes = [_outcome(group, pair, root, strict=strict) for strict in (True, False)]
                rows.append(Row(change, *outcomes))
    return found


def page(found: Mapping[str, list[Row]]) -> str:
    """The whole page, as it is committed."""
    lines = [INTRODUCTION]
    for title, rows in found.items():
        lines += [f"## {title}", "", "| since it was saved | `load` | `load(strict=False)` |"]
        lines += ["| --- | --- | --- |", *map(str, rows), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.stdout.write(page(tables()))
