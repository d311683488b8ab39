"""From a captured structure to a compiled plan: DCP's planners, our layout.

Enters: a Captured whose structure is new. Leaves: a CompiledPlan that any number of saves of this structure
share; on the coordinator also the GlobalPlan that publishes them. A plan is made in three exchanges: each
rank sends a draft's message, gets an assignment, lays out its file and tells where its items lie. Invariant:
a plan is a pure function of structures and options and holds arrays and bytes, no tensor and no object per
item.
Source: torch/distributed/checkpoint/planner.py (the order of calls), default_planner.py.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import le
from typing import Any, Protocol

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner, WriteItemType

from .._foreign import PlannerError, planner_code
from .._geometry import Offsets
from ..formats import DISTCP, FileLayout, Format
from ..state import Captured, CaptureError, Structure
from .all_plans import AllPlans
from .assignment import Assignment, ReplicaGroup, assign, shared_leaves
from .conflicts import ConflictError
from .global_plan import GlobalPlan, ItemLocations
from .image import lay_out, told
from .leaf_equality import Canonical
from .local_plan import LocalPlan, make_local_plan
from .merging import Merge
from .protocol import is_custom
from .public_plan import PublicShare
from .replica_groups import shared_tensors
from .replica_turns import Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningOptions:
    """How saves and loads are planned."""

    save: Callable[[], SavePlanner] = DefaultSavePlanner
    """Makes the planner of one save: a factory, because a planner keeps state between its calls. One that
    overrides a method of DCP's protocol is called in each save, in DCP's order; DCP's own, whatever its
    options, plans once for all saves of one structure."""
    load: Callable[[], LoadPlanner] = DefaultLoadPlanner
    """Makes the planner of one load, as ``save`` does. DCP's own class stands for the engine's way to load;
    any other planner decides on what is read and where it goes, in DCP's order."""
    cache: bool = True
    """Reuse the plan while the structure stays the same. Off costs a full plan on every save."""

    def __post_init__(self) -> None:
        for verb, factory in (("save", self.save), ("load", self.load)):
            if not callable(factory):
                raise ValueError(
                    f"PlanningOptions({verb}=...) takes a class or function that makes planners, not "
                    f"{factory!r}"
                )


def custom_planner(options: PlanningOptions) -> SavePlanner | None:
    """A planner that is to be called in one save; None if DCP's default one would plan the same. Raises
    PlannerError."""
    if options.save is DefaultSavePlanner:  # of most engines, and asked in each save
        return None
    with planner_code(options.save, "__call__"):
        planner = options.save()
    if not isinstance(planner, SavePlanner):
        raise _no_planner("save", planner)
    return planner if is_custom(planner) else None


def load_planner(options: PlanningOptions) -> LoadPlanner:
    """The planner of one load. Raises PlannerError."""
    with planner_code(options.load, "__call__"):
        planner = options.load()
    if not isinstance(planner, LoadPlanner):
        raise _no_planner("load", planner)
    return planner


def _no_planner(verb: str, value: object) -> PlannerError:
    return PlannerError(
        f"PlanningOptions({verb}=...) gave a {type(value).__name__}, which is no {verb.title()}Planner"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledPlan:
    """Everything about one rank's share of a save that does not change while the structure does not."""

    structure: Structure
    """The whole captured state's."""
    local_plan: LocalPlan
    """What was told to the coordinator of it."""
    generation: str
    """The uid of the save that made it: all ranks' plans of one generation belong together."""
    format: Format
    rooms: list[int]
    """How many bytes of a file each leaf of the structure gets. They only grow: a counter that
    shrinks by a digit must not move every offset behind it."""
    layout: FileLayout
    """How this rank's files are laid out; item i is ``tensors[i]``, then come ``leaves``."""
    tensors: list[int]
    """What this rank writes, by index in the structure and in the order of the layout."""
    leaves: list[int]
    groups: list[tuple[int, list[int]]]
    """(group, leaves) that this rank has in common with the other ranks of the group."""
    replicas: list[ReplicaGroup]
    """The pieces of tensors that it has in common with others."""
    shared: GlobalPlan | None
    """What is published; the coordinator's alone."""
    merge: Merge | None = None
    """What this rank puts together of public files; on all ranks None if nothing has to be."""
    is_exact: bool = False
    """Whether the items of leaves end where their bytes do, not where their rooms end: a planner's bytes need
    not be an item that can be padded. Such a plan is for one save."""
    canonical: Canonical = field(default_factory=dict, compare=False)
    """Leaves that are pickled otherwise on each rank although they are equal; they are compared by value. All
    ranks find them out together."""
    rotation: Rotation = field(default_factory=Rotation, compare=False, repr=False)
    """Which blocks of ``replicas`` its saves compare; the coordinator's alone."""

    @property
    def names(self) -> list[str]:
        """Names of the tensors that this rank writes."""
        return [self.structure.tensor_names[index] for index in self.tensors]

    def has_room_for(self, captured: Captured) -> bool:
        """Whether every leaf fits where the plan puts it."""
        # in C, since it is asked of every leaf in every save
        return all(map(le, map(self.format.room, map(len, captured.leaf_items)), self.rooms))

    def padded(self, items: Sequence[bytes]) -> list[bytes]:
        """The items of the leaves that this rank writes, each grown to its room."""
        leaves = zip(items, self.leaves, strict=True)
        if self.is_exact:
            return [item.ljust(self.rooms[index], b"\0") for item, index in leaves]
        return [self.format.padded(item, self.rooms[index]) for item, index in leaves]


class Draft(Protocol):
    """One rank's share of a plan, before the ranks agree."""

    local_plan: LocalPlan
    message: Any
    """What the coordinator needs of it; plain data."""

    def merge(
        self, messages: Sequence[Any], suspects: list[str] | None = None
    ) -> tuple[list[Any], GlobalPlan]:
        """All ranks' messages -> each rank's answer, plain data, and what the coordinator keeps, which
        alone calls it. ``suspects`` as for AllPlans. Raises ConflictError."""

    def assigned(self, answer: Any) -> Assignment:
        """What this rank writes."""


def draft_plan(
    captured: Captured, previous: CompiledPlan | None, options: PlanningOptions, *, is_coordinator: bool
) -> Draft:
    """Begin a plan. ``previous`` is the plan of the structure, if that is not new. Raises CaptureError."""
    local_plan = make_local_plan(captured, previous.local_plan if previous else None)
    # this very class: one that derives from it may plan otherwise
    if options.save is DefaultSavePlanner:
        return DefaultDraft(local_plan)
    return PlannerDraft(captured, local_plan, options.save(), is_coordinator)


class DefaultDraft:
    """What DCP's default planner would plan, without its objects per item: ten times faster for many
    tensors (docs/adr/0007)."""

    def __init__(self, local_plan: LocalPlan) -> None:
        self.local_plan = local_plan
        self.message = local_plan

    def merge(
        self, messages: Sequence[LocalPlan], suspects: list[str] | None = None
    ) -> tuple[list[Assignment], GlobalPlan]:
        all_plans = AllPlans(messages, suspects)
        assignments = assign(all_plans)
        for assignment, groups in zip(assignments, shared_tensors(all_plans), strict=True):
            assignment["replicas"] = groups
        return assignments, GlobalPlan(all_plans)

    def assigned(self, answer: Assignment) -> Assignment:
        return answer


class PlannerDraft:
    """A plan by DCP's own planner with options of the user's.

    Their plans travel as pickles, as they do in stock: whoever writes to the process group's store can run
    code here.
    """

    def __init__(
        self, captured: Captured, local_plan: LocalPlan, planner: SavePlanner, is_coordinator: bool
    ) -> None:
        self.local_plan = local_plan
        self._structure = captured.structure
        self._planner = planner
        # stock's own cache lives on the class and takes tensors of another dtype for the same; ours does not
        planner.__dict__["_enable_plan_caching"] = False
        # flattened already: planner_data comes from our own walk
        planner.set_up_planner(captured.flat(), None, is_coordinator)
        # a planner's plan may hold any class, so plain data will not do
        self.message = (local_plan, pickle.dumps(planner.create_local_plan()))

    def merge(
        self, messages: Sequence[tuple[LocalPlan, bytes]], suspects: list[str] | None = None
    ) -> tuple[list[Any], GlobalPlan]:
        all_plans = AllPlans([local_plan for local_plan, _ in messages], suspects)
        plans, metadata = self._planner.create_global_plan([pickle.loads(plan) for _, plan in messages])
        shared = shared_leaves(all_plans)
        # refused: the manifest's tree would name what no file holds
        if lost := sorted(all_plans.names() - metadata.state_dict_metadata.keys()):
            raise ConflictError(f"the planner left out {lost[:3]}; this release writes what the state holds")
        answers = [
            (pickle.dumps(plan), groups, replicas)
            for plan, groups, replicas in zip(plans, shared, shared_tensors(all_plans), strict=True)
        ]
        return answers, GlobalPlan(all_plans, metadata)

    def assigned(self, answer: tuple[bytes, Any, Any]) -> Assignment:
        plan, (groups, replicas) = pickle.loads(answer[0]), answer[1:]
        assert isinstance(plan, SavePlan)
        structure = self._structure
        keys = _tensor_keys(structure)
        pieces = {key: index for index, key in enumerate(keys)}
        # to a planner each of tied names is a tensor; here they are one, and are written once
        pieces |= {(name, keys[index][1]): index for name, index in structure.ties}
        leaves = {name: index for index, name in enumerate(structure.leaf_names)}
        exotic = {structure.leaf_names[index] for index, *_ in structure.exotic}
        wrapped = {
            (piece.name, piece.shard.offsets): leaves[leaf] for leaf, piece in structure.pieces.items()
        }
        mine = Assignment(tensors=[], leaves=[], groups=groups, replicas=replicas)
        # every item is looked up in the state: what a planner made up itself has no bytes here to copy
        for item in self._planner.finish_plan(plan).items:
            name, is_tensor = item.index.fqn, item.type is not WriteItemType.BYTE_IO
            key = name, tuple(item.index.offset or ())
            if key in wrapped:
                index, target, fits = wrapped[key], mine["leaves"], is_tensor
            elif name in leaves:
                index, target = leaves[name], mine["leaves"]
                fits = is_tensor == (name in exotic)
            else:
                index, target, fits = pieces.get(key, -1), mine["tensors"], is_tensor
            if index < 0:
                raise CaptureError(f"the planner added {item.index}, which the state does not hold")
            if not fits:
                raise CaptureError(f"{name}: the planner and the state disagree on whether it is a tensor")
            target.append(index)
        for indices in (mine["tensors"], mine["leaves"]):
            # tied names have led to one piece several times
            indices[:] = sorted(set(indices))
        return mine


def _tensor_keys(structure: Structure) -> list[tuple[str, Offsets]]:
    """(name, offsets) of each piece."""
    return [
        (name, structure.shards[index].offsets if index in structure.shards else (0,) * len(shape))
        for index, (name, shape) in enumerate(zip(structure.tensor_names, structure.shapes, strict=True))
    ]


def compile_plan(
    captured: Captured,
    local_plan: LocalPlan,
    mine: Assignment,
    generation: str,
    shared: GlobalPlan | None,
    *,
    previous: CompiledPlan | None = None,
    is_exact: bool = False,
    format: Format = DISTCP,
    public: PublicShare | None = None,
) -> tuple[CompiledPlan, ItemLocations]:
    """Lay out the image of what is assigned to this rank. ``previous`` is the plan of the structure, if that
    is not new: no leaf gets less room than it had. ``is_exact`` as in CompiledPlan."""
    structure, tensors, leaves = captured.structure, mine["tensors"], mine["leaves"]
    rooms = list(map(format.room, map(len, captured.leaf_items)))
    if previous is not None:  # a leaf that shrank stays where it is, so that others do
        rooms = list(map(max, rooms, previous.rooms))
    layout = lay_out(format, structure, tensors, [rooms[index] for index in leaves], public)
    if layout.order is not None:
        tensors = [tensors[number] for number in layout.order]
    plan = CompiledPlan(
        structure=structure,
        local_plan=local_plan,
        generation=generation,
        format=format,
        rooms=rooms,
        layout=layout,
        tensors=tensors,
        leaves=leaves,
        groups=mine["groups"],
        replicas=mine["replicas"],
        shared=shared,
        is_exact=is_exact,
    )
    lengths = layout.item_bytes
    if is_exact:
        lengths = [*lengths[: len(tensors)], *(len(captured.leaf_items[index]) for index in leaves)]
    locations = ItemLocations(
        tensors=array("I", tensors).tobytes(),
        leaves=array("I", leaves).tobytes(),
        offsets=array("Q", layout.item_offsets).tobytes(),
        lengths=array("Q", lengths).tobytes(),
        own_start=layout.own_start,
        runs=told(layout),
    )
    return plan, locations
