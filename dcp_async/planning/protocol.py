"""DCP's planner protocol on one rank, for planners of the user's that decide on what is written.

Enters: a captured state and a planner for this save alone. Leaves: a Captured of what the planner gives for
the items of its plan, and a draft of it, which goes the way of any other state from there. Invariant: what is
published was given by ``resolve_data`` on some rank once, and is what the planner's metadata names; nothing
else is.
Source: torch/distributed/checkpoint/planner.py and state_dict_saver.py (the order of calls).
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Sequence

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from .._foreign import PlannerError, checked, pickled_plan, planner_code
from .._geometry import Offsets
from ..formats import Tree, dcp_paths, leaf_names, tree_from_json, tree_from_paths, tree_to_json, usable_paths
from ..info import JSON
from ..state import Captured, ResolvedItem, captured_items, is_sharded
from .all_plans import AllPlans
from .assignment import Assignment, assign
from .global_plan import GlobalPlan
from .local_plan import LocalPlan, make_local_plan

_METHODS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
    "lookup_object",
    "transform_object",
)
ItemId = tuple[str, Offsets]
"""(name, where it begins in the whole tensor) of an item; what is no tensor begins nowhere."""


def is_custom(planner: SavePlanner) -> bool:
    """Whether ``planner`` may plan or give other data than DCP's default one."""
    # by what it does, not by its class: one that only sets options of the default keeps the fast path
    return any(
        getattr(getattr(planner, method, None), "__func__", None) is not getattr(DefaultSavePlanner, method)
        for method in _METHODS
    )


class SaveProtocol:
    """One rank's calls of a planner, in DCP's order. For one save, and one thread at a time."""

    def __init__(
        self, planner: SavePlanner, captured: Captured, *, is_coordinator: bool, storage_meta: StorageMeta
    ) -> None:
        self._planner = planner
        self._captured = captured
        self._is_coordinator = is_coordinator
        self._storage_meta = storage_meta
        self._metadata: Metadata | None = None
        """What ``create_global_plan`` says is saved; the coordinator's alone."""

    def local_plan(self) -> bytes:
        """What goes to the coordinator. Raises PlannerError."""
        planner = self._planner
        # stock's own cache lives on the class and takes tensors of another dtype for the same (docs/adr/0007)
        if isinstance(planner, DefaultSavePlanner):
            planner.__dict__["_enable_plan_caching"] = False
        state = self._captured.nested()
        with planner_code(planner, "set_up_planner"):
            # planners from before torch 2.3 do not take it, and stock asks the same way
            if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
                planner.set_up_planner(
                    state_dict=state, storage_meta=self._storage_meta, is_coordinator=self._is_coordinator
                )
            else:
                planner.set_up_planner(state, self._is_coordinator)  # type: ignore[arg-type]
        with planner_code(planner, "create_local_plan"):
            plan = planner.create_local_plan()
        return pickled_plan(
            planner, "create_local_plan", checked(planner, "create_local_plan", plan, SavePlan)
        )

    def global_plans(self, messages: Sequence[bytes]) -> list[bytes]:
        """All ranks' plans -> each rank's; the coordinator alone calls it. Raises PlannerError."""
        planner, method = self._planner, "create_global_plan"
        plans = [pickle.loads(message) for message in messages]
        with planner_code(planner, method):
            made = planner.create_global_plan(plans)
        if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], (list, tuple))):
            raise PlannerError(
                f"{type(planner).__name__}.{method}() gave {type(made).__name__}, not (plans, metadata)"
            )
        self._metadata = checked(planner, method, made[1], Metadata)
        if len(made[0]) != len(plans):
            raise PlannerError(
                f"{type(planner).__name__}.{method}() gave {len(made[0])} plans for {len(plans)} ranks"
            )
        made_plans = [checked(planner, method, plan, SavePlan) for plan in made[0]]
        self._check_dtypes(made_plans)
        return [pickled_plan(planner, method, plan) for plan in made_plans]

    def _check_dtypes(self, plans: Sequence[SavePlan]) -> None:
        """Whether the metadata names the dtypes of the plans. What is published is what the data has: many a
        planner casts it and says so nowhere."""
        assert self._metadata is not None
        for item in (item for plan in plans for item in plan.items):
            entry, planned = self._metadata.state_dict_metadata.get(item.index.fqn), item.tensor_data
            if not isinstance(entry, TensorStorageMetadata) or planned is None:
                continue
            if planned.properties.dtype != entry.properties.dtype:
                raise PlannerError(
                    f"{type(self._planner).__name__}: its metadata says of {item.index.fqn} that it is "
                    f"{entry.properties.dtype}, its plan {planned.properties.dtype}"
                )

    def resolve(self, answer: bytes) -> ResolvedDraft:
        """Finish this rank's plan, and ask for the data of each of its items. Raises PlannerError,
        CaptureError."""
        planner = self._planner
        with planner_code(planner, "finish_plan"):
            plan = planner.finish_plan(pickle.loads(answer))
        items = checked(planner, "finish_plan", plan, SavePlan).items
        known: set[ItemId] = set()
        for item in items:
            if (identity := _identity(item)) in known:
                raise PlannerError(f"{type(planner).__name__}: its plan names {_told(identity)} twice")
            known.add(identity)
        # objects first, as stock's writer asks
        ordered = sorted(items, key=lambda item: item.type is not WriteItemType.BYTE_IO)
        resolved = [self._resolved(item) for item in ordered]
        captured = captured_items(
            [item for item in resolved if not _is_empty_piece(item)], self._captured.tree
        )
        return ResolvedDraft(planner, captured, self._metadata)

    def _resolved(self, item: WriteItem) -> ResolvedItem:
        with planner_code(self._planner, "resolve_data"):
            value = self._planner.resolve_data(item)
        name, offsets = _identity(item)
        what = f"{type(self._planner).__name__}.resolve_data() gave {type(value).__name__} for {name}"
        if item.type is WriteItemType.BYTE_IO:
            if not isinstance(value, io.BytesIO):
                raise PlannerError(f"{what}, not the BytesIO that its plan says")
            return ResolvedItem(name, (), (), value.getvalue())
        if not isinstance(value, torch.Tensor) or item.tensor_data is None:
            raise PlannerError(f"{what}, not the tensor that its plan says")
        if is_sharded(value) or value.is_nested or value.is_meta:
            raise PlannerError(f"{what}, which has no bytes of its own; it takes the local part of a tensor")
        planned = item.tensor_data
        if value.shape != planned.chunk.sizes:
            raise PlannerError(
                f"{what} of {tuple(value.shape)}, and its plan says {tuple(planned.chunk.sizes)}"
            )
        # in host memory, as stock's writer has it: of what a planner queues on a device no event tells
        local = value.detach().cpu()
        if planned.properties.requires_grad and local.is_floating_point() and not local.is_inference():
            local = local.detach().requires_grad_()  # on an alias: `.metadata` tells, the trainer's stays
        return ResolvedItem(name, offsets, tuple(planned.size), local)


class ResolvedDraft:
    """The plan of what a planner made, between the ranks: each writes what it resolved."""

    def __init__(self, planner: SavePlanner, captured: Captured, metadata: Metadata | None) -> None:
        self.captured = captured
        self.local_plan = make_local_plan(captured, None)
        self._planner = type(planner).__name__
        self._metadata = metadata
        structure = captured.structure
        ids: list[ItemId] = [
            (name, structure.shards[index].offsets if index in structure.shards else ())
            for index, name in enumerate(structure.tensor_names)
        ]
        self.message = (self.local_plan, [*ids, *((name, ()) for name in structure.leaf_names)])

    def merge(
        self, messages: Sequence[tuple[LocalPlan, list[ItemId]]], suspects: list[str] | None = None
    ) -> tuple[list[Assignment], GlobalPlan]:
        """As ``Draft.merge``. Raises PlannerError, ConflictError."""
        metadata = self._metadata
        assert metadata is not None
        writer: dict[ItemId, int] = {}
        for rank, (_, ids) in enumerate(messages):
            for identity in ids:
                if (other := writer.setdefault(identity, rank)) != rank:
                    raise PlannerError(
                        f"{self._planner}: {_told(identity)} is in the plans of ranks {other} and {rank}"
                    )
        all_plans = AllPlans([local_plan for local_plan, _ in messages], suspects)
        self._check_names(all_plans, metadata)
        tree, own = _tree(all_plans, metadata), metadata.planner_data
        # a planner may keep there what it likes, also what can't be compared; paths our writer encodes faster
        paths = usable_paths(metadata)
        if isinstance(own, dict) and len(own) == len(paths) and paths == dcp_paths(tree):
            own = None
        return assign(all_plans), GlobalPlan(all_plans, tree=tree, planner_data=own)

    def assigned(self, answer: Assignment) -> Assignment:
        """As ``Draft.assigned``."""
        return answer

    def _check_names(self, all_plans: AllPlans, metadata: Metadata) -> None:
        names, entries = all_plans.names(), metadata.state_dict_metadata
        for name in sorted(names ^ entries.keys()):
            raise PlannerError(
                f"{self._planner}: its metadata names {name}, which is in no rank's plan"
                if name in entries
                else f"{self._planner}: {name} is in a rank's plan, and its metadata does not name it"
            )
        for signature, alike in all_plans.held_by_signature.items():
            size = all_plans.kind(signature)[1]
            boxes = sorted(all_plans.pieces(signature))
            for name in alike:
                if _boxes(entries[name]) != (size, boxes):
                    raise PlannerError(
                        f"{self._planner}: its metadata says of {name} that it is "
                        f"{_described(entries[name])}, the plan writes a tensor of {size} in {boxes!r:.200}"
                    )
        for leaves in all_plans.leaf_cohorts:
            for index, leaf in enumerate(leaves.names):
                name = leaves.pieces[index][0] if index in leaves.pieces else leaf
                if isinstance(entries[name], TensorStorageMetadata) != (index in leaves.exotic):
                    raise PlannerError(
                        f"{self._planner}: its metadata says of {name} that it is "
                        f"{_described(entries[name])}, and the plan says otherwise"
                    )


def _tree(all_plans: AllPlans, metadata: Metadata) -> JSON:
    """The containers that the names lie in: those of the state if its names are all there, else as far as
    ``planner_data`` tells."""
    names = all_plans.names()
    of_state = all_plans.tree()
    if set(leaf_names(tree_from_json(of_state))) == names:
        return of_state
    made: Tree = tree_from_paths(usable_paths(metadata), sorted(names))
    return tree_to_json(made)


def _identity(item: WriteItem) -> ItemId:
    chunk = item.tensor_data.chunk if item.tensor_data is not None else None
    return item.index.fqn, tuple(chunk.offsets) if chunk is not None else ()


def _is_empty_piece(item: ResolvedItem) -> bool:
    value = item.value
    # nothing to store, where the whole has elements: the pieces of other ranks make it up
    return isinstance(value, torch.Tensor) and not value.numel() and torch.Size(item.size).numel() > 0


def _told(identity: ItemId) -> str:
    name, offsets = identity
    return f"{name} at {offsets}" if any(offsets) else name


def _boxes(entry: object) -> tuple[Offsets, list[tuple[Offsets, Offsets]]] | None:
    """Size and chunks of a tensor, but for empty chunks of one that has elements."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]
    is_empty = not entry.size.numel()
    return tuple(entry.size), sorted(chunk for chunk in chunks if is_empty or 0 not in chunk[1])


def _described(entry: object) -> str:
    boxes = _boxes(entry)
    return "no tensor" if boxes is None else f"a tensor of {boxes[0]} in {boxes[1]!r:.200}"
