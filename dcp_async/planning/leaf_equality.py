"""Leaves that several ranks share: the same bytes, or else equal values.

Enters: a captured state, which has the bytes of each leaf; on the coordinator what all ranks told. Leaves:
hashes, which leaves are not equal, and an error that says where they differ. Invariant: what is compared is
what was captured. Bytes are compared in every save, since that costs next to nothing; a leaf is decoded only
where bytes differed once.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..state import Captured
from .canonical import Places, UndecidableError, digest, first_difference, places
from .conflicts import ConflictError
from .local_plan import leaf_hashes

Canonical = dict[int, tuple[int, int]]
"""Leaf -> (hash of its bytes, digest of its value) as they were last; a digest of the same bytes holds."""
Digest = int | str
"""A hash of a value, or why it has none."""
Description = Places | str
"""What a value consists of, or why that can't be told."""

_DESCRIBED = 3
"""For how many leaves an error says where they differ."""


def shared_hashes(captured: Captured, canonical: Canonical) -> list[int]:
    """A hash of each leaf that ranks can compare: of its bytes, or of its value for those in
    ``canonical``."""
    hashes = leaf_hashes(captured)
    # a copy: the loop may enter leaves that another save of this plan has found out about
    for leaf in list(canonical):
        last, value = canonical[leaf]
        if last != hashes[leaf]:
            try:
                value = digest(_decoded(captured.leaf_items[leaf]))
            except UndecidableError:
                value = hashes[leaf]  # the ranks find out that it differs
            canonical[leaf] = (hashes[leaf], value)
        hashes[leaf] = value
    return hashes


def _decoded(item: bytes) -> Any:
    """What this process has pickled itself."""
    try:
        # no policy of trust: these bytes have never left this process
        return torch.load(io.BytesIO(item), weights_only=False)
    except Exception as error:  # runs the leaf's own code, which may raise anything
        raise UndecidableError(f"it can't be unpickled ({type(error).__name__}: {error})") from error


def _items(captured: Captured, names: Sequence[str]) -> dict[str, bytes]:
    wanted = set(names)
    return {
        name: item
        for name, item in zip(captured.structure.leaf_names, captured.leaf_items, strict=True)
        if name in wanted
    }


def value_digests(captured: Captured, names: Sequence[str]) -> dict[str, Digest]:
    """Digests of those of ``names`` that this rank holds."""
    digests: dict[str, Digest] = {}
    for name, item in _items(captured, names).items():
        try:
            digests[name] = digest(_decoded(item))
        except UndecidableError as error:
            digests[name] = str(error)
    return digests


def descriptions(captured: Captured, names: Sequence[str]) -> dict[str, Description]:
    """Descriptions of the first few of those of ``names`` that this rank holds."""
    described: dict[str, Description] = {}
    for name, item in _items(captured, names[:_DESCRIBED]).items():
        try:
            described[name] = places(_decoded(item))
        except UndecidableError as error:
            described[name] = str(error)
    return described


# The coordinator's side.


def conflicts(told: Sequence[Mapping[str, Digest]]) -> list[str]:
    """Names of leaves that are not equal on all ranks that hold them, or not known to be."""
    known: dict[str, Digest] = {}
    unequal: dict[str, None] = {}
    for mine in told:
        for name, value in mine.items():
            # what can't be told counts as unequal: one rank's bytes would be kept in silence for all
            if known.setdefault(name, value) != value or isinstance(value, str):
                unequal[name] = None
    return list(unequal)


def explained(told: Sequence[Mapping[str, Description]], names: Sequence[str]) -> ConflictError:
    """What to say of ``names``, which differ."""
    texts = [_explained(told, name) for name in names[:_DESCRIBED]]
    if len(names) > len(texts):
        texts.append(f"{len(names) - len(texts)} more differ: {', '.join(names[len(texts) :][:5])}")
    return ConflictError(
        f"{'; '.join(texts)}. If it is meant to, put it into PerRank(...), which keeps one for each rank; if "
        "not, the ranks have drifted apart"
    )


def _explained(told: Sequence[Mapping[str, Description]], name: str) -> str:
    holders = [(rank, mine[name]) for rank, mine in enumerate(told) if name in mine]
    first, left = holders[0]
    for rank, right in holders[1:]:
        if isinstance(left, str) or isinstance(right, str):
            why = left if isinstance(left, str) else right
            return (
                f"{name} differs between rank {first} and rank {rank} as it is pickled, and whether it is "
                f"equal all the same can't be told: {why}; save what it consists of, or give its class a "
                "__reduce__() that gives the same for equal objects"
            )
        if left[""][0] != right[""][0]:
            path, theirs, ours = first_difference(left, right)
            where = f" at {path}" if path else ""
            words = f": {theirs} and {ours}" if theirs != ours else ""
            return f"{name} differs between rank {first} and rank {rank}{where}{words}"
    return f"{name} differs between ranks"
