"""Which tensors which ranks hold alike, so that they can be compared in every save.

Enters: AllPlans. Leaves: per rank, its pieces of each group of ranks that hold the same, in an
order that all ranks of the group share. Pure: no I/O. Invariant: a piece that two or more ranks hold is in
a group, under whichever names it goes on each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from .all_plans import AllPlans
from .assignment import ReplicaGroup
from .local_plan import Mesh

_SAMPLED_BLOCKS = 128
"""How many blocks one save compares on one rank, over all of its groups: 8 MiB."""


def pieces_of(group: ReplicaGroup) -> Iterator[int]:
    """The group's pieces, by their index in the rank's ``Structure``."""
    for first, count in group["runs"]:
        yield from range(first, first + count)


Column = tuple[int, int]
"""(cohort, which of its entries in a signature): ranks of one column have one index per tensor."""
_Key = tuple[tuple[int, ...], tuple[Column, ...], tuple[Mesh, ...]]


def shared_tensors(all_plans: AllPlans) -> list[list[ReplicaGroup]]:
    """Per rank, the groups it is in."""
    rows = _rows(all_plans)
    members = [0] * all_plans.num_ranks
    for ranks, _, _ in rows:
        for rank in ranks:
            members[rank] += 1
    # by the rank that is in most groups: all ranks of a group must compare as many blocks
    blocks = max(1, _SAMPLED_BLOCKS // max([1, *members]))
    groups: list[list[ReplicaGroup]] = [[] for _ in range(all_plans.num_ranks)]
    for number, ((ranks, columns, meshes), tensors) in enumerate(rows.items()):
        distinct = list(dict.fromkeys(columns))
        # one order for all ranks of the group: a digest is of bytes one behind the other
        ordered = list(zip(*sorted(tensors), strict=True))
        runs = {column: _runs(indices) for column, indices in zip(distinct, ordered, strict=True)}
        for rank, column in zip(ranks, columns, strict=True):
            groups[rank].append(
                ReplicaGroup(number=number, blocks=blocks, meshes=list(meshes), runs=runs[column])
            )
    return groups


def _rows(all_plans: AllPlans) -> dict[_Key, dict[tuple[int, ...], None]]:
    """(ranks, column of each, meshes if there are several) -> the pieces of that group, each as its index per
    distinct column."""
    rows: dict[_Key, dict[tuple[int, ...], None]] = {}
    for signature, names in all_plans.held_by_signature.items():
        # where a cohort occurs once it says which column is meant, and tensors of several signatures share a
        # group
        several = len({cohort for cohort, _ in signature}) < len(signature)
        for (_, shape), holders in all_plans.pieces(signature).items():
            if len(holders) < 2 or not math.prod(shape):
                continue
            entries: dict[int, int] = {}
            for rank, entry in holders:
                # tied names on one rank are the same memory, and no replicas of each other
                entries.setdefault(rank, entry)
            if len(entries) < 2:
                continue
            ranks = tuple(sorted(entries))
            on = {all_plans.meshes[rank][signature[entries[rank]][1]] for rank in ranks}
            meshes = tuple(sorted(mesh for mesh in on if mesh is not None))
            columns = tuple(
                (signature[entry][0], entry if several else 0) for entry in map(entries.__getitem__, ranks)
            )
            # ties of all ranks are one and the same row
            group = rows.setdefault((ranks, columns, meshes if len(meshes) > 1 else ()), {})
            distinct = list(dict.fromkeys(map(entries.__getitem__, ranks)))
            for name in names:
                refs = all_plans.held[name]
                group[tuple(refs[entry][1] for entry in distinct)] = None
    return rows


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    first = count = 0
    for index in indices:
        if count and index == first + count:
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = index, 1
    return [*runs, (first, count)] if count else runs
