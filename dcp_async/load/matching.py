"""How a state and a checkpoint fit: which names meet, which are missing, unexpected or of another kind.

Enters: Targets and an opened checkpoint's Contents. Leaves: a Match. Pure: no I/O, and nothing of the state
is touched.
"""

from __future__ import annotations

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from ..catalog import Contents
from ..options import Dtypes
from ..state import Targets
from .aliases import are_one_view, groups_in_memory
from .device_writes import DeviceWrites
from .match import Match
from .tensor_matching import TensorMatcher
from .tree_matching import TreeMatcher


def match_state(
    targets: Targets, contents: Contents, *, dtypes: Dtypes, writes: DeviceWrites | None
) -> Match:
    """Compare names, kinds, shapes and dtypes. Touches nothing. ``writes``: where tensors on devices are
    made."""
    tensors = TensorMatcher(targets, contents, dtypes, writes)
    match, names = tensors.match, contents.names
    settled: set[str] = set()
    surplus: set[str] = set()
    misfits: list[tuple[str, str]] = []
    per_rank = (*targets.flat.per_rank, *targets.flat.own)
    if targets.statefuls or per_rank:  # else no tree is needed: decoding that of many tensors takes long
        trees = TreeMatcher(targets, contents, tensors)
        trees.run()
        settled, surplus, misfits = trees.settled, trees.surplus, trees.misfits
    for name, tensor in targets.tensors.items():
        if name not in settled:
            tensors.match_tensor(name, tensor)
    for name in targets.leaves - settled:
        meta = names.get(name)
        if meta is None:
            match.missing.append(name)
        elif isinstance(meta, BytesStorageMetadata):
            match.leaves.append(name)
        else:
            match.mismatch(name, "is a tensor in the checkpoint, but not in the state")
    # after all others: by now what became of the parameters themselves has been said
    for name, reason in misfits:
        match.mismatch(name, reason)
    known = targets.tensors.keys() | targets.leaves | set(match.mismatched)
    known |= (match.fresh.keys() | set(match.leaves)) - surplus
    inside = tuple(f"{prefix}." for prefix in targets.prefixes)
    others = tuple(f"{prefix}." for prefix in per_rank)  # belongs to other ranks
    match.unexpected = [
        name
        for name in names
        if name not in known
        and (name in targets.prefixes or name.startswith(inside))
        and not name.startswith(others)
    ]
    _separate_aliases(tensors, contents)
    return match


def _separate_aliases(tensors: TensorMatcher, contents: Contents) -> None:
    """Find targets that share memory with others, of which more than these names was saved. What is only
    offered gives way to new tensors; what is left is compared when its bytes are read."""
    match = tensors.match
    names = contents.names  # of leaves that were taken apart, it is put together anew at each look
    for group in groups_in_memory(match.tensors, match.gappy):
        # tied in the state and saved as one tensor: whichever is read last, the bytes are the same
        if are_one_view(group) and len({_locations(name, names[name], contents) for name, _ in group}) == 1:
            continue
        for name in sorted({name for name, _ in group} & match.offered):
            del match.tensors[name]
            tensors.take([name])
        left = [(name, region) for name, region in group if name in match.tensors]
        if len(left) > 1:
            match.aliases.append(left)


def _locations(
    name: str, meta: TensorStorageMetadata | BytesStorageMetadata, contents: Contents
) -> tuple[object, ...]:
    """Where the bytes of a tensor lie; names that were saved as one tensor have the same."""
    chunks = meta.chunks if isinstance(meta, TensorStorageMetadata) else ()
    locations = tuple(contents.locations.get((name, chunk.offsets)) for chunk in chunks)
    return locations if locations and None not in locations else (name,)
