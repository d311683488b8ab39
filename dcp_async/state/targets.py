"""capture_targets(): what of a state a load can fill, and who takes what was saved whole.

Enters: a state, the Schema of an opened checkpoint, and what Statefuls were asked in this load. Leaves:
Targets. Runs in the caller's thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .._geometry import Offsets, box_at, slices
from ..formats import text_of
from .asking import UNASKED, Given, ask_in_order, asynchronous_error
from .capture import check_unique, is_exotic
from .checkpointable import is_checkpointable
from .containers import CaptureError
from .flat_state import FlatState
from .flatten import flatten
from .holdings import memory_of_modules, resizable_owners
from .optimizers import is_custom, parameter_sizes
from .schema import Asked, Schema
from .sharding import Shard, is_sharded, sharded
from .stateful import AppState, FromRank, PerRank, is_stateful

_EXTRA_STATE = "_extra_state"
"""What torch.nn.Module calls that of ``get_extra_state()``."""


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor in memory, to be filled with the part of a global one that begins at ``offsets``."""

    tensor: torch.Tensor
    offsets: Offsets

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Region:
        """The region of a tensor that is no part of another."""
        return cls(tensor, (0,) * tensor.dim())

    @classmethod
    def piece(cls, tensor: torch.Tensor, shard: Shard | None) -> Region:
        """A piece of a distributed tensor; one without a shard is the whole."""
        return cls(tensor, shard.offsets) if shard else cls.whole(tensor)

    @classmethod
    def all_of(cls, name: str, tensor: torch.Tensor) -> list[Region]:
        """What of ``tensor`` lies here, if it is a distributed one; else the whole."""
        if not is_sharded(tensor):
            return [cls.whole(tensor)]
        return [cls.piece(local, shard) for shard, local in sharded(name, tensor, {}).pieces]

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The part of a global ``value`` that belongs here."""
        if value.shape == self.tensor.shape:
            return value
        return value[slices(box_at(self.offsets, self.tensor.shape))]


@dataclass(frozen=True, slots=True)
class Whole:
    """What takes all that was saved at and below its name, in the structure in which that was saved."""

    present: Any
    """What is there, or UNASKED: its tensors are memory to read into where shape and dtype agree."""
    is_stateful: bool = False
    """Whether it is all of a Stateful's state."""
    keeps: bool = False
    """Whether entries stay that were not saved: an optimizer's options, of which each release has others."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """A mapping that grows with an optimizer's history: it takes all that was saved below it."""

    owner: type
    """The Stateful's."""
    takes: Callable[[Any, bool], bool] | None = None
    """Which keys it has a place for, told whether one was a parameter's; None if for every one."""
    model: str | None = None
    """Where the parameters lie whose names are its keys."""
    sizes: Mapping[str, torch.Size] = field(default_factory=dict)
    """By number, of parameters whose entries are known to be like them."""


@dataclass(slots=True, kw_only=True)
class Targets:
    """Where a load puts what it reads."""

    flat: FlatState
    tensors: dict[str, torch.Tensor]
    """Name -> tensor to fill in place: plain, exotic, or distributed."""
    local: dict[str, list[Region]]
    """What lies here of the distributed ones."""
    leaves: set[str]
    """Names of other leaves: replaced."""
    statefuls: dict[str, tuple[Any, Any]]
    """Name -> (Stateful, what it gave or UNASKED), in the state's order."""
    wholes: dict[str, Whole]
    """Places that take what was saved there, by name."""
    grows: dict[str, Callable[[str], bool]]
    """Mappings of Statefuls that take entries which they lack, by name: says which."""
    optimizer_states: dict[str, OptimizerState]
    """Optimizers' mappings of parameters to what is kept for them, by name."""
    named_groups: dict[str, list[Any]]
    """The parameter groups of AppStates, by name: only their parameters tell which of the saved is theirs."""
    strict: set[str]
    """Names below one of ``wholes`` that must be there in the shape that they have: parameters, buffers,
    DTensors."""
    prefixes: set[str]
    """Top-level names of the state."""
    entries: dict[str, torch.Tensor]
    """Name of an optimizer's entry for a distributed parameter -> that parameter."""
    device: torch.device
    """Where tensors are made that take the place of those on the meta device."""
    world_size: int

    def parameters(self) -> dict[str, torch.Tensor]:
        """Name of an optimizer's entry -> its parameter, of optimizers that torch alone loads."""
        return _parameters(self.flat, self.tensors, is_theirs=lambda optimizer: not is_custom(optimizer))

    def mesh_devices(self) -> set[str]:
        """Kinds of devices that shards are made on in place of those on the meta device."""
        return {
            tensor.device_mesh.device_type
            for name in self.local
            if type(tensor := self.tensors[name]) is DTensor and tensor.is_meta
        }

    def memory(self) -> list[torch.Tensor]:
        """Every tensor that may be written to, or lies where one is made."""
        tensors = [tensor for name, tensor in self.tensors.items() if name not in self.local]
        tensors += [region.tensor for regions in self.local.values() for region in regions]
        # of a bare optimizer the state holds no parameters. Their hooks are not asked, as nothing is read
        # into them
        for _, optimizer, _ in self.flat.statefuls:
            if isinstance(optimizer, Optimizer):
                tensors += [
                    parameter.to_local() if isinstance(parameter, DTensor) else parameter
                    for parameter in _owned(optimizer)
                    if not is_lazy(parameter)
                ]
        return tensors


def capture_targets(
    state: Mapping[str, Any], schema: Schema, asked: Asked, *, rank: int = 0, world_size: int = 1
) -> Targets:
    """Find out what ``state`` can take of a checkpoint. Raises CaptureError."""
    given: Given = {}

    wishes: set[str] | None = None if world_size == 1 else set()  # then all is agreed

    def ask(name: str, stateful: Any) -> Any:
        return asked.ask(schema, name, stateful, wishes)

    if world_size > 1:
        ask_in_order(state, rank, given, ask, is_load=True)
    flat = flatten(state, rank, given, ask=ask, wants_tree=False, is_load=True)
    flat.check_memory(flat.shapes())  # which sorts nested tensors out
    # before a dict: that would keep one of two tensors of a name, and leave the other as it is
    check_unique(flat, flat.tensor_names)
    plain = {
        name: tensor
        for name, tensor in zip(flat.tensor_names, flat.tensors, strict=True)
        if name not in flat.distributed
    }
    device = torch.get_default_device()
    targets = Targets(
        flat=flat,
        tensors=plain | flat.distributed,
        local=_local_regions(flat),
        leaves=set(),
        statefuls={name: (stateful, inner) for name, stateful, inner in flat.statefuls},
        wholes={},
        grows={},
        optimizer_states={},
        named_groups={},
        strict=set(),
        prefixes=set(map(text_of, state)),
        entries=_entries(flat),
        # under torch.device("meta"), as models are made, new tensors would have no bytes to read into
        device=torch.device("cpu") if device.type == "meta" else device,
        world_size=world_size,
    )
    for prefix, (stateful, inner) in targets.statefuls.items():
        _describe(targets, prefix, stateful, inner)
    _sort_leaves(targets)
    # before anything is read: else it would be found when half of the state has been replaced
    _check_assignable("", state)
    return targets


def _local_regions(flat: FlatState) -> dict[str, list[Region]]:
    """What of each distributed tensor lies here."""
    regions: dict[str, list[Region]] = {name: [] for name in flat.distributed}
    for index, name in enumerate(flat.tensor_names):
        if name in regions:
            regions[name].append(Region.piece(flat.tensors[index], flat.shards.get(index)))
    for leaf, tensor in zip(flat.leaf_names, flat.leaves, strict=True):
        if (piece := flat.pieces.get(leaf)) is not None:
            regions[piece.name].append(Region(tensor, piece.shard.offsets))
    return regions


def _sort_leaves(targets: Targets) -> None:
    """Note which leaves are tensors to be filled, and which are replaced. Raises CaptureError."""
    flat = targets.flat
    for name, leaf in zip(flat.leaf_names, flat.leaves, strict=True):
        # a local region of a distributed tensor, which is a target by its own name
        if name in flat.pieces:
            continue
        if is_lazy(leaf):
            if name not in targets.wholes:
                raise CaptureError(
                    f"{name} is uninitialized and has no shape; run the lazy module once, then load into it"
                )
        elif is_exotic(leaf):
            targets.tensors[name] = leaf
        else:
            targets.leaves.add(name)


def _describe(targets: Targets, prefix: str, stateful: Any, given: Any) -> None:
    """Note what of a Stateful takes what was saved whole, and what must fit."""
    if inspect.iscoroutinefunction(stateful.state_dict) or inspect.isasyncgenfunction(stateful.state_dict):
        raise asynchronous_error(prefix, stateful)
    # now, by its definition: called when all is read, it would give a coroutine that nobody awaits
    if inspect.iscoroutinefunction(stateful.load_state_dict):
        raise CaptureError(
            f"{prefix}: {type(stateful).__name__}.load_state_dict() is asynchronous and would not be "
            "awaited; give the state an object that takes its state in one piece"
        )
    if isinstance(stateful, AppState) and isinstance(given, Mapping):
        _describe_module(targets, f"{prefix}.model", stateful.model, given.get("model"))
        mapping = OptimizerState(type(stateful), stateful.taker(), f"{prefix}.model")
        targets.optimizer_states[f"{prefix}.{stateful.entries_at}"] = mapping
        if stateful.entries_at != "optim":  # flat, its options are entries like any other
            _describe_options(targets, f"{prefix}.optim", given.get("optim"), named=True)
        for key, value in given.items():
            if key not in ("model", "optim"):
                targets.wholes[f"{prefix}.{key}"] = Whole(value)
        # a subclass may have saved keys of its own beside the two
        if type(stateful) is not AppState:
            targets.grows[prefix] = lambda key: key not in ("model", "optim")
    elif isinstance(stateful, torch.nn.Module):
        _describe_module(targets, prefix, stateful, given)
    elif isinstance(stateful, Optimizer):
        targets.optimizer_states[f"{prefix}.state"] = OptimizerState(
            type(stateful), sizes=parameter_sizes(stateful)
        )
        _describe_options(targets, prefix, given)
    else:
        targets.wholes[prefix] = Whole(given, is_stateful=True)
        if given is not UNASKED:
            targets.strict |= _strict_below(targets.flat, prefix, stateful)


def _describe_module(targets: Targets, name: str, module: torch.nn.Module, given: Any) -> None:
    if not isinstance(given, Mapping):
        return
    owners = resizable_owners(module)

    def may_resize(key: str) -> bool:
        return key.rpartition(".")[0] in owners

    for key, value in given.items():
        # whatever is no tensor is no parameter and no buffer
        is_extra = not isinstance(value, torch.Tensor) or str(key).rpartition(".")[2] == _EXTRA_STATE
        if is_extra or (owners and may_resize(str(key))):
            targets.wholes[f"{name}.{key}"] = Whole(value)
    if owners:
        targets.grows[name] = may_resize


def _describe_options(targets: Targets, name: str, given: Any, *, named: bool = False) -> None:
    """An optimizer takes all that was saved of its options and of what it keeps beside its parameters'
    entries. ``named``: their parameters have names, by which a group finds its own wherever it lies."""
    if not isinstance(given, Mapping):
        return
    groups = given.get("param_groups")
    if named and isinstance(groups, list):
        targets.named_groups[f"{name}.param_groups"] = groups
        groups = None
    for number, group in enumerate(groups if isinstance(groups, list) else ()):
        targets.wholes[f"{name}.param_groups.{number}"] = Whole(group, keeps=True)
    for key, value in given.items():
        if str(key).startswith("param_groups."):  # a flat one
            targets.wholes[f"{name}.{key}"] = Whole(value, keeps=True)
        elif key not in ("state", "param_groups") and (
            _is_extra_of_optimizer(str(key)) or not isinstance(value, torch.Tensor)
        ):
            targets.wholes[f"{name}.{key}"] = Whole(value)
            inside = f"{name}.{key}"  # distributed tensors are filled as they lie here, or refused
            targets.strict |= {one for one in targets.local if one == inside or one.startswith(f"{inside}.")}
    targets.grows[name] = lambda key: key.startswith("param_groups.") or _is_extra_of_optimizer(key)


def _is_extra_of_optimizer(key: str) -> bool:
    """Whether an optimizer has ``key`` beside its parameters' entries and its groups, flat or not."""
    return key.partition(".")[0] not in ("state", "param_groups")


def _strict_below(flat: FlatState, prefix: str, stateful: Any) -> set[str]:
    """Names of parameters, buffers and distributed tensors in what a Stateful gave: it shows those of a
    model."""
    inside = f"{prefix}."
    strict = {name for name in flat.distributed if name.startswith(inside)}
    # by address: under which names it shows a model's tensors is its own affair (docs/adr/0020)
    if memory := memory_of_modules(stateful):
        strict |= {
            name
            for name, tensor in zip(flat.tensor_names, flat.tensors, strict=True)
            if name.startswith(inside) and tensor.data_ptr() in memory
        }
    return strict


def _entries(flat: FlatState) -> dict[str, torch.Tensor]:
    # an entry that the live optimizer lacks is cut as the parameter is that it belongs to
    return {
        name: tensor
        for name, tensor in _parameters(flat, flat.distributed).items()
        if (type(tensor) is DTensor or is_checkpointable(tensor)) and not tensor.is_meta
    }


def _parameters(
    flat: FlatState,
    tensors: Mapping[str, torch.Tensor],
    *,
    is_theirs: Callable[[Optimizer], bool] = lambda optimizer: True,
) -> dict[str, torch.Tensor]:
    """Name of an optimizer's entry -> its parameter: of an AppState one of ``tensors``."""
    parameters: dict[str, torch.Tensor] = {}
    for prefix, stateful, _ in flat.statefuls:
        if isinstance(stateful, AppState) and all(map(is_theirs, stateful.optimizers)):
            inside = f"{prefix}.model."
            for name, tensor in tensors.items():
                if name.startswith(inside):
                    parameters[f"{prefix}.optim.state.{name.removeprefix(inside)}"] = tensor
        elif isinstance(stateful, Optimizer) and is_theirs(stateful):
            owned = enumerate(_owned(stateful))
            parameters |= {f"{prefix}.state.{number}": parameter for number, parameter in owned}
    return parameters


def _owned(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _check_assignable(name: str, container: Any) -> None:
    """Leaves are replaced in the caller's containers. Raises CaptureError for one that can't be assigned
    to."""
    is_mapping = isinstance(container, Mapping)
    entries = container.items() if is_mapping else enumerate(container)
    fixed = is_mapping and not isinstance(container, MutableMapping)
    for key, value in entries:
        if isinstance(value, torch.Tensor) or is_stateful(value):
            continue
        if isinstance(value, (Mapping, list)):
            _check_assignable(f"{name}.{key}" if name else str(key), value)
        elif fixed and not isinstance(value, (PerRank, FromRank)):
            where = name or "the state"
            raise CaptureError(
                f"{where} is a {type(container).__name__}, which can't be assigned to, and holds {key!r}, "
                "which is no tensor; use a dict"
            )
