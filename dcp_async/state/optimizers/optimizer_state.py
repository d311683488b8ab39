"""The state of optimizers by their parameters' names: what is saved, and what each takes back.

Enters: optimizers, what their parameters are called, a state as ``get_optimizer_state_dict`` of torch gives
it. Leaves: such a state, or one ``load_state_dict`` argument per optimizer. Invariant: each entry and each
option goes to the parameter and the group that it was saved for, or a problem is named before anything is
touched.
Source: torch/distributed/checkpoint/state_dict.py, torch/optim/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..checkpointable import is_checkpointable
from .optimizer_load import few, same_value

_PARAMS = "params"
_NAMES = "param_names"
_STATE = "state"
_GROUPS = "param_groups"


@dataclass(slots=True)
class Member:
    """One optimizer, and what its parameters are called."""

    optimizer: Optimizer
    groups: list[list[tuple[str, ...]]]
    """Per group and parameter, its names: several for a flat parameter of FSDP1, which stands for several."""
    numbers: list[list[int]] = field(default_factory=list)
    """Per group and parameter, what ``Optimizer.state_dict()`` calls it: its place, the last one if it is
    twice in the group."""

    @property
    def kind(self) -> str:
        return type(self.optimizer).__name__

    def by_number(self) -> dict[int, tuple[str, ...]]:
        """Number -> names of that parameter."""
        return {
            number: names
            for group, numbers in zip(self.groups, self.numbers, strict=True)
            for names, number in zip(group, numbers, strict=True)
        }


class OptimizerNames:
    """What the parameters of some optimizers are called.

    Raises: ValueError for a parameter that has no name, since it is not the model's, and for one that two
    optimizers have.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], names: Mapping[torch.Tensor, Sequence[str]], model: str
    ) -> None:
        """``names``: of each parameter of the ``model``; further ones are other names of the same."""
        self._model = model
        self.members = [
            self._member(optimizer, {parameter: (known[0],) for parameter, known in names.items()})
            for optimizer in optimizers
        ]
        self._first = {name: known[0] for known in names.values() for name in known}
        self._check_apart()

    @classmethod
    def of_flat(
        cls, optimizers: Sequence[Optimizer], names: Mapping[torch.Tensor, Sequence[str]], model: str
    ) -> OptimizerNames:
        """For parameters that each stand for all of their ``names``."""
        made = cls((), {}, model)
        made.members = [
            made._member(optimizer, {parameter: tuple(known) for parameter, known in names.items()})
            for optimizer in optimizers
        ]
        # in files each of them has an entry of its own, under its own name
        made._first = {name: name for known in names.values() for name in known}
        made._check_apart()
        return made

    def _member(self, optimizer: Optimizer, names: Mapping[torch.Tensor, tuple[str, ...]]) -> Member:
        member = Member(optimizer, [])
        start = 0
        for number, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group[_PARAMS]):
                if parameter not in names:
                    raise ValueError(
                        f"parameter {index} of group {number} of {type(optimizer).__name__}, of shape "
                        f"{tuple(parameter.shape)}, is no parameter of the {self._model}, so it has no "
                        "name; put its module into the model, or its optimizer beside the AppState"
                    )
            # as Optimizer.state_dict() numbers them
            numbers = {parameter: start + place for place, parameter in enumerate(group[_PARAMS])}
            start += len(group[_PARAMS])
            member.groups.append([names[parameter] for parameter in group[_PARAMS]])
            member.numbers.append([numbers[parameter] for parameter in group[_PARAMS]])
        return member

    def _check_apart(self) -> None:
        owner: dict[str, Member] = {}
        for member in self.members:
            for name in _names(member.groups):
                if owner.setdefault(name, member) is not member:
                    raise ValueError(
                        f"{name} is a parameter of two optimizers ({owner[name].kind} and {member.kind}), "
                        "which share one mapping of names; put one of them into the state by itself"
                    )

    def first_name(self, name: str) -> str:
        """The name under which files have what is called ``name``."""
        return self._first.get(name, name)

    def known(self) -> set[str]:
        """All names that the optimizers' parameters have."""
        own = {name for member in self.members for name in _names(member.groups)}
        return {name for name, first in self._first.items() if first in own}

    # -- save

    def state(self, states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """One state of all optimizers, of what their ``state_dict()`` gave. Raises ValueError for what it has
        no place for."""
        entries: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        state_dict: dict[str, Any] = {_STATE: entries, _GROUPS: groups}
        for member, given in zip(self.members, states, strict=True):
            names = member.by_number()
            for key, entry in given[_STATE].items():
                _put(entries, self._saved_name(member, names, key), entry, member.kind)
            for group in given[_GROUPS]:
                saved = dict(group)
                saved[_PARAMS] = [
                    name
                    for number in group[_PARAMS]
                    for name in (names[number] if isinstance(number, int) else (number,))
                ]
                groups.append(saved)
            for key, value in given.items():
                if key not in (_STATE, _GROUPS):
                    _put(state_dict, key, value, member.kind)
        return state_dict

    def _saved_name(self, member: Member, names: Mapping[int, tuple[str, ...]], key: Any) -> Any:
        if isinstance(key, int) and key in names:
            return names[key][0]
        # one optimizer's own state can only be its own
        if len(self.members) > 1 and key not in self._first:
            raise ValueError(
                f"{member.kind}.state_dict() has an entry {key!r} that is of no parameter; with several "
                "optimizers nothing would say whose it is, so put this one into the state by itself"
            )
        return key

    # -- load

    def assign(self, saved: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
        """(one argument for ``load_state_dict`` per optimizer, by names; what does not fit, in words).

        Where something does not fit, the parameter or the group keeps what it has.
        """
        problems: list[str] = []
        places = [
            (member, number, [self.first_name(name) for name in _names([group])])
            for member in self.members
            for number, group in enumerate(member.groups)
        ]
        groups = [
            (group, [self.first_name(name) for name in group.get(_PARAMS, ())]) for group in saved[_GROUPS]
        ]
        chosen = _match_groups(places, groups, problems)
        entries = {self.first_name(key): entry for key, entry in saved[_STATE].items()}
        known = {name for _, _, names in places for name in names}
        of_others = {name for _, names in groups for name in names} | set(self._first.values())
        strange = [str(key) for key in entries if key not in known and key in of_others]
        if strange:
            problems.append(f"entries of parameters that no optimizer has here: {few(strange)}")
        made: list[dict[str, Any]] = []
        first = 0
        for member in self.members:
            own = chosen[first : first + len(member.groups)]
            mine = set(_names(member.groups))
            state = {key: entry for key, entry in entries.items() if key in mine}
            if len(self.members) == 1:  # what is of no parameter is the optimizer's own
                state |= {k: v for k, v in entries.items() if k not in known and k not in of_others}
            for names in chain.from_iterable(member.groups):
                saved_names = [name for name in names if name in state]
                if len(names) > 1 and saved_names and len(saved_names) < len(names):
                    problems.append(
                        f"{few(names)} share one flat parameter here, and only {few(saved_names)} have "
                        "entries"
                    )
            made.append(
                {
                    _STATE: state,
                    _GROUPS: [
                        _options(live, saved_group, list(_names([group])))
                        for live, saved_group, group in zip(
                            member.optimizer.param_groups, own, member.groups, strict=True
                        )
                    ],
                    **{k: v for k, v in saved.items() if k not in (_STATE, _GROUPS)},
                }
            )
            first += len(member.groups)
        return made, problems


def by_number(member: Member, named: Mapping[str, Any]) -> dict[str, Any]:
    """What ``assign`` made for ``member``, by its parameters' numbers."""
    numbers = {
        name: number
        for group, of_group in zip(member.groups, member.numbers, strict=True)
        # one name each: what stands for several goes by names (flat_parameters.to_load)
        for (name, *_), number in zip(group, of_group, strict=True)
    }
    groups = [
        {**group, _PARAMS: list(of_group)}
        for group, of_group in zip(named[_GROUPS], member.numbers, strict=True)
    ]
    state = {numbers.get(key, key): entry for key, entry in named[_STATE].items()}
    return {**named, _STATE: state, _GROUPS: groups}


def _names(groups: Iterable[Iterable[tuple[str, ...]]]) -> Iterator[str]:
    return (name for group in groups for names in group for name in names)


def _put(flat: dict[Any, Any], key: Any, value: Any, kind: str) -> None:
    if key in flat:
        raise ValueError(f"{key!r} is in the state of two optimizers, one of them {kind}; save them apart")
    flat[key] = value


def _match_groups(
    places: Sequence[tuple[Member, int, Sequence[str]]],
    saved: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    problems: list[str],
) -> list[Mapping[str, Any]]:
    """What was saved for each group: groups are the same if they have the same parameters, in any order."""
    by_members: dict[frozenset[str], Mapping[str, Any]] = {}
    holder: dict[str, Mapping[str, Any]] = {}
    empty: list[Mapping[str, Any]] = []
    for options, names in saved:
        if twice := [name for name in dict.fromkeys(names) if name in holder]:
            problems.append(f"two groups of the checkpoint have {few(twice)}")
        holder |= dict.fromkeys(names, options)
        if names:
            by_members[frozenset(names)] = options
        else:
            empty.append(options)
    without = [number for number, (_, _, names) in enumerate(places) if not names]
    if len(without) != len(empty):
        problems.append(f"{len(without)} groups without parameters here, {len(empty)} in the checkpoint")
    chosen: list[Mapping[str, Any]] = []
    # without parameters only their order tells them apart
    hollow = iter(empty)
    for member, number, names in places:
        if not names:
            chosen.append(next(hollow, {}))
            continue
        options = by_members.get(frozenset(names), {})
        if not options:
            missing = [name for name in names if name not in holder]
            together = {id(holder[name]): holder[name] for name in names if name in holder}
            if missing:
                problems.append(f"no group of the checkpoint has {few(missing)}")
            elif len(together) > 1:
                problems.append(
                    f"the parameters of group {number} of {member.kind} are in {len(together)} groups of the "
                    "checkpoint"
                )
            # a problem by now; with strict=False the group gets the options of one that it was part of
            options = next(iter(together.values()), {})
        chosen.append(options)
    here = {name for _, _, names in places for name in names}
    for number, (_, names) in enumerate(saved):
        if gone := [name for name in names if name not in here]:
            problems.append(f"group {number} of the checkpoint also has {few(gone)}")
    split = {frozenset(names) for _, _, names in places}
    for number, (_, names) in enumerate(saved):
        if names and frozenset(names) not in split and all(name in here for name in names):
            problems.append(f"group {number} of the checkpoint has other parameters than any group here")
    return chosen


def _options(live: Mapping[str, Any], saved: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A group with the options that were saved; one that nobody had when it was saved stays as it is."""
    made = {key: value for key, value in live.items() if key != _PARAMS} | dict(saved)
    own_names = saved.get(_NAMES)
    if own_names is not None and _NAMES in live:
        # saved in another order than the parameters have here
        by_name = dict(zip(saved[_PARAMS], own_names, strict=False))
        made[_NAMES] = [by_name.get(name, own) for name, own in zip(names, live[_NAMES], strict=False)]
    made[_PARAMS] = names
    return made


def parameter_sizes(optimizer: Optimizer) -> dict[str, torch.Size]:
    """Number -> size of each parameter of one of torch.optim's own classes; nothing of another, nor
    of one that is a part of a larger tensor: what is kept for that may be a part as well or not."""
    # another class may keep anything under a parameter's number, of any size
    if not type(optimizer).__module__.startswith("torch.optim."):
        return {}
    owned = [parameter for group in optimizer.param_groups for parameter in group[_PARAMS]]
    return {
        str(number): parameter.shape
        for number, parameter in enumerate(owned)
        if not is_lazy(parameter) and not is_checkpointable(parameter)
    }


# -- flat


def flatten(state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` as torch's ``flatten_optimizer_state_dict`` has it, without numbers of groups. Raises
    ValueError for what that form has no place for."""
    made: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(
                        f"{name} has a key {key!r}, which a flat optimizer state can only give back as text; "
                        "leave out flatten_optimizer_state_dict"
                    )
                put(f"{name}.{key}", inner)
            if value:
                return
        # as in torch's own form: more than these it does not take
        if not isinstance(value, (torch.Tensor, int, float)) or name in made:
            raise ValueError(
                f"{name} is a {type(value).__name__}: a flat optimizer state holds one tensor or number of "
                "each name; leave out flatten_optimizer_state_dict"
            )
        made[name] = value

    if extra := [key for key in state if key not in (_STATE, _GROUPS)]:
        raise ValueError(f"a flat optimizer state has no place for {few(map(str, extra))}")
    for name, entry in state[_STATE].items():
        put(f"{_STATE}.{name}", entry)
    for number, group in enumerate(state[_GROUPS]):
        if not group[_PARAMS]:
            raise ValueError(
                f"parameter group {number} has no parameters, and a flat optimizer state has each group's "
                "options by its parameters' names; leave out flatten_optimizer_state_dict, or the group"
            )
        for name in group[_PARAMS]:
            for key, value in group.items():
                if key != _PARAMS:
                    made[f"{_GROUPS}.{name}.{key}"] = value
    return made


def owner_of(key: str, names: Collection[str]) -> tuple[str, str, str] | None:
    """(section, parameter, rest) of a flat state's ``key``; None if it is of none of the ``names``."""
    section, _, rest = key.partition(".")
    end = len(rest)
    # from the right: the longest name first, as one parameter's name may begin another's
    while section in (_STATE, _GROUPS) and (end := rest.rfind(".", 0, end)) > 0:
        if rest[:end] in names:
            return section, rest[:end], rest[end + 1 :]
    return None


def unflatten(flat: Mapping[str, Any], names: OptimizerNames, problems: list[str]) -> dict[str, Any]:
    """The state that ``flat`` was made of. Parameters are grouped as they are here, which a flat state does
    not tell."""
    entries: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    strange = []
    known = names.known()
    for key, value in flat.items():
        location = owner_of(key, known)
        if location is None:
            strange.append(key)
            continue
        section, name, rest = location
        if section == _GROUPS and rest == _NAMES:
            continue  # in the order of a group that a flat state does not tell
        target = (entries if section == _STATE else options).setdefault(names.first_name(name), {})
        # an entry may hold mappings, whose keys are in the name; an option is one value
        *above, last = rest.split(".") if section == _STATE and rest not in target else (rest,)
        for part in above:
            target = target.setdefault(part, {})
        target[last] = value
    if strange:
        problems.append(f"no optimizer here has the parameter of {few(strange)}")
    groups: list[dict[str, Any]] = []
    for member in names.members:
        for number, group in enumerate(member.groups):
            own = [names.first_name(name) for name in _names([group])]
            first = options.get(own[0], {}) if own else {}
            for name in own:
                # a flat state repeats a group's options for each parameter: they may contradict each other
                other = options.get(name)
                if other is None:
                    problems.append(f"the checkpoint has no options for {name}")
                elif keys := [
                    key for key in {**first, **other} if not same_value(first.get(key), other.get(key))
                ]:
                    problems.append(
                        f"{own[0]} and {name} are both in group {number} of {member.kind}, but were saved "
                        f"with different {few(keys)}"
                    )
            groups.append({**first, _PARAMS: own})
    return {_STATE: entries, _GROUPS: groups}
