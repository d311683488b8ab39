"""What ranks hold that does not go together, and the errors that say so.

Enters: what all ranks told of a tensor or a leaf. Leaves: nothing, or a ConflictError that names it and the
ranks. Pure: no I/O. Invariant: every element of every tensor lies in exactly one of its distinct pieces, and
what ranks hold under one name is the same on all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from .._geometry import Offsets
from .local_plan import Mesh

Box = tuple[Offsets, Offsets]
"""(offsets, shape) of a piece in its tensor."""


class ConflictError(ValueError):
    """Ranks do not hold the same; the message names what and which ranks."""


def check_covered(
    name: str, size: Offsets, pieces: Collection[Box], meshes: Callable[[], list[Mesh]]
) -> None:
    """Raises ConflictError unless ``pieces`` make up a tensor of ``size``. ``meshes`` finds the meshes that
    they lie on, for the message."""
    # bounds first: the sum below proves something only of pieces that lie inside
    for offsets, shape in pieces:
        if not len(offsets) == len(shape) == len(size):
            raise ConflictError(f"{name}: the piece of {shape} at {offsets} has other dimensions than {size}")
        if any(low < 0 or low + n > extent for low, n, extent in zip(offsets, shape, size, strict=True)):
            raise ConflictError(f"{name}: the piece of {shape} at {offsets} lies outside of its {size}")
    covered, whole = sum(math.prod(shape) for _, shape in pieces), math.prod(size)
    if covered > whole and len(distinct := meshes()) > 1:
        raise ConflictError(two_meshes(name, distinct))
    # one sum shows nearly every gap and overlap; two that cancel each other are left to the sweep
    if covered != whole:
        raise ConflictError(
            f"{name}: the ranks hold {covered} of its {whole} elements; "
            "pieces must cover a tensor exactly once"
        )
    if len(pieces) > 1 and (twice := _overlapping(list(pieces))) is not None:
        raise ConflictError(
            f"{name}: the pieces at {twice[0]} and {twice[1]} overlap; "
            "pieces must cover a tensor exactly once"
        )


def _overlapping(pieces: list[Box]) -> Box | None:
    """The offsets of two boxes that have an element in common, if there are any.

    A sweep along the dimension in which they differ most: shards of rows, columns or a mesh meet few others.
    """
    # an empty piece has no element to share, wherever it lies
    pieces = [(offsets, shape) for offsets, shape in pieces if 0 not in shape]
    if len(pieces) < 2 or not pieces[0][0]:
        return None
    along = max(range(len(pieces[0][0])), key=lambda dim: len({offsets[dim] for offsets, _ in pieces}))
    reaching: list[Box] = []
    for offsets, shape in sorted(pieces, key=lambda piece: piece[0][along]):
        reaching = [box for box in reaching if box[0][along] + box[1][along] > offsets[along]]
        for other, extents in reaching:
            if all(
                a < b + m and b < a + n for a, n, b, m in zip(offsets, shape, other, extents, strict=True)
            ):
                return other, offsets
        reaching.append((offsets, shape))
    return None


def two_meshes(name: str, meshes: Sequence[Mesh]) -> str:
    """That tensors of one name, one on each of ``meshes``, are not the same."""
    described = " and on that of ".join(f"ranks {', '.join(map(str, mesh))}" for mesh in meshes)
    return (
        f"{name} lies on the device mesh of {described}, and each holds all of it: these are different "
        "tensors of one name. Give them different names, those of the layers of the whole model for one, or "
        "put them into PerRank(...)"
    )


def differing_leaves(hashes: Iterable[Mapping[str, int]]) -> list[str]:
    """Names whose hashes differ; each of ``hashes`` is by name."""
    known: dict[str, int] = {}
    differing: dict[str, None] = {}  # a dict for its order
    for by_name in hashes:
        for name, value in by_name.items():
            if known.setdefault(name, value) != value:
                differing[name] = None
    return list(differing)


def check_leaves(hashes: Iterable[tuple[int, Mapping[str, int]]]) -> None:
    """Raises ConflictError if a leaf has other bytes on another rank. ``hashes``: (rank, hash by name)."""
    first: dict[str, tuple[int, int]] = {}
    for rank, by_name in hashes:
        for name, value in by_name.items():
            first_rank, first_value = first.setdefault(name, (rank, value))
            if first_value != value:
                raise ConflictError(
                    f"{name} differs between rank {first_rank} and rank {rank}. If it is meant to, put it "
                    "into PerRank(...), which keeps one for each rank; if not, the ranks have drifted apart"
                )
