"""Pure: from captured structures to who writes what, where every byte lies and what is published."""

from __future__ import annotations

from .assignment import ReplicaGroup
from .conflicts import ConflictError, differing_leaves, two_meshes
from .global_plan import GlobalPlan, ItemLocations, Publication
from .leaf_equality import (
    Description,
    Digest,
    conflicts,
    descriptions,
    explained,
    shared_hashes,
    value_digests,
)
from .local_plan import Mesh, group_hashes, make_local_plan
from .merging import Assembly, Merge
from .planner import (
    CompiledPlan,
    DefaultDraft,
    Draft,
    PlanningOptions,
    compile_plan,
    custom_planner,
    draft_plan,
    load_planner,
)
from .protocol import SaveProtocol
from .replica_groups import pieces_of
from .replica_turns import Rotation, Turn
from .self_proof import prove_head, prove_item
from .stock_publication import WrittenItem, stock_publication

__all__ = [
    "Assembly",
    "CompiledPlan",
    "ConflictError",
    "DefaultDraft",
    "Description",
    "Digest",
    "Draft",
    "GlobalPlan",
    "ItemLocations",
    "Merge",
    "Mesh",
    "PlanningOptions",
    "Publication",
    "ReplicaGroup",
    "Rotation",
    "SaveProtocol",
    "Turn",
    "WrittenItem",
    "compile_plan",
    "conflicts",
    "custom_planner",
    "descriptions",
    "differing_leaves",
    "draft_plan",
    "explained",
    "group_hashes",
    "load_planner",
    "make_local_plan",
    "pieces_of",
    "prove_head",
    "prove_item",
    "shared_hashes",
    "stock_publication",
    "two_meshes",
    "value_digests",
]
