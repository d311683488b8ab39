"""Who writes what: the coordinator's answer to every rank's local plan.

Enters: AllPlans. Leaves: an Assignment per rank. Pure: no I/O. Invariant: every piece of every tensor, and
every leaf, is written by exactly one rank.
Source: torch/distributed/checkpoint/default_planner.py (what stock plans).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TypedDict

from .all_plans import AllPlans, Holder, by_name, dtype_of
from .local_plan import Mesh


class ReplicaGroup(TypedDict):
    """One rank's share of a group of ranks that hold the same pieces of tensors. Plain data: it travels."""

    number: int
    blocks: int
    """How many blocks of large tensors one save compares; the same on all ranks of the group."""
    meshes: list[Mesh]
    """Those of the DTensors of one name that the pieces belong to, where these lie on several."""
    runs: list[tuple[int, int]]
    """(first, count) of consecutive indices in the rank's LocalPlan: the pieces in the group's order."""


class Assignment(TypedDict):
    """What one rank writes. Plain data: it travels."""

    tensors: list[int]
    """Pieces, by their index in the rank's LocalPlan, ascending."""
    leaves: list[int]
    groups: list[tuple[int, list[int]]]
    """(group, leaves): what this rank has in common with the other ranks of the group."""
    replicas: list[ReplicaGroup]
    """The pieces of tensors that it has in common with others."""


def assign(all_plans: AllPlans) -> list[Assignment]:
    """Give each piece to one of the ranks that hold it, so that all write about as many bytes."""
    assignments = [
        Assignment(tensors=[], leaves=[], groups=groups, replicas=[]) for groups in shared_leaves(all_plans)
    ]
    _assign_tensors(all_plans, [assignment["tensors"] for assignment in assignments])
    written: set[str] = set()
    for leaves in all_plans.leaf_cohorts:
        # leaves are small, so the lowest rank that has one writes it
        mine = assignments[leaves.ranks[0]]["leaves"]
        mine += [index for index, name in enumerate(leaves.names) if name not in written]
        written.update(leaves.names)
    return assignments


def _assign_tensors(all_plans: AllPlans, assigned: Sequence[list[int]]) -> None:
    loads = [0] * len(assigned)
    shared: dict[tuple[int, ...], list[tuple[int, list[Holder], list[list[int]]]]] = {}
    for signature, names in all_plans.own_by_signature.items():
        # entry of the signature -> the index of each of the tensors in that cohort
        refs = [all_plans.own[name] for name in names]
        indices = [[ref[entry][1] for ref in refs] for entry in range(len(signature))]
        itemsize = dtype_of(all_plans.kind(signature)[0]).itemsize
        for (_, shape), holders in all_plans.pieces(signature).items():
            nbytes = math.prod(shape) * itemsize
            # what one rank alone holds is settled first; the shared pieces even out what that leaves
            if len(holders) == 1:
                rank, entry = holders[0]
                loads[rank] += nbytes * len(names)
                assigned[rank].extend(indices[entry])
            else:
                ranks = tuple(rank for rank, _ in holders)
                shared.setdefault(ranks, []).append((nbytes, holders, indices))
    for ranks, pieces in shared.items():
        # largest pieces first, each to the rank with the least so far
        queue = [(loads[rank], position) for position, rank in enumerate(ranks)]
        heapq.heapify(queue)
        for nbytes, holders, indices in sorted(pieces, key=lambda piece: -piece[0]):
            for tensor in range(len(indices[0])):
                load, position = queue[0]
                heapq.heapreplace(queue, (load + nbytes, position))
                rank, entry = holders[position]
                loads[rank] += nbytes
                assigned[rank].append(indices[entry][tensor])
    for mine in assigned:
        mine.sort()  # in the structure's order, so that neighbours are copied by one call


def shared_leaves(all_plans: AllPlans) -> list[list[tuple[int, list[int]]]]:
    """Per rank, (group, leaves) of the leaves that a group of ranks has in common."""
    holders = by_name([leaves.names for leaves in all_plans.leaf_cohorts])
    groups: dict[tuple[int, ...], int] = {}
    members: list[dict[int, list[int]]] = [{} for _ in all_plans.leaf_cohorts]
    for refs in holders.values():
        if sum(len(all_plans.leaf_cohorts[number].ranks) for number, _ in refs) > 1:
            # by cohorts, not by ranks: thousands of ranks that sent the same bytes are one number here
            group = groups.setdefault(tuple(number for number, _ in refs), len(groups))
            for number, index in refs:
                members[number].setdefault(group, []).append(index)
    by_rank: list[list[tuple[int, list[int]]]] = [[] for _ in range(all_plans.num_ranks)]
    for leaves, mine in zip(all_plans.leaf_cohorts, members, strict=True):
        common = sorted(mine.items())
        for rank in leaves.ranks:
            by_rank[rank] = common
    return by_rank
