"""What is read of an opened checkpoint as fresh objects: all of it, parts of it, tensors, boxes of tensors.

Enters: an opened checkpoint, and names or patterns of names. Leaves: objects that nobody else has seen, or an
error of the tree. Invariant: no memory is asked for before the bytes that would fill it are known to be
there.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .._foreign import is_foreign
from .._geometry import extents
from ..catalog import Contents
from ..errors import LoadError
from ..formats import Tree, build, children_of, leaf_names, pruned
from ..state import Region
from .device_writes import DeviceWrites
from .failures import LoadFailures
from .globs import Glob
from .indexing import Index, box_of
from .keys import Keys
from .pipeline import LoadPipeline, LoadServices
from .room import check_room
from .tensor_matching import fresh_tensor, is_raw

logger = logging.getLogger(__name__)


async def read_fresh(
    contents: Contents,
    services: LoadServices,
    *,
    keys: Iterable[str] | None,
    device: torch.device,
    writes: DeviceWrites | None,
) -> dict[str, Any]:
    """The checkpoint, or what lies at and below ``keys``, as fresh objects in the structure that was saved.

    Args:
        device: where tensors are made; ``writes`` brings them there if it is none of the host's.
    Raises: LoadError for a key that is no name and no prefix of one.
    """
    structure = contents.structure
    if keys is not None:
        structure = _chosen(structure, dict.fromkeys(keys), contents)
    values = await read_names(contents, services, leaf_names(structure), device=device, writes=writes)
    keys_of = Keys(services.trust, LoadFailures(contents, touched=False))
    tree: dict[str, Any] = build(structure, values.__getitem__, keys_of.unpickle)
    return tree


async def read_outline(
    contents: Contents, services: LoadServices, stand_in: Callable[[str, TensorStorageMetadata], Any]
) -> dict[str, Any]:
    """The checkpoint in the structure that was saved, with ``stand_in`` for each tensor that is plain bytes;
    all else is read."""
    metas = contents.names
    names = leaf_names(contents.structure)
    raw = {name: stand_in(name, meta) for name in names if is_raw(meta := metas[name], name, contents)}
    others = [name for name in names if name not in raw]
    values = raw | await read_names(contents, services, others, device=torch.device("cpu"), writes=None)
    keys_of = Keys(services.trust, LoadFailures(contents, touched=False))
    tree: dict[str, Any] = build(contents.structure, values.__getitem__, keys_of.unpickle)
    return tree


async def read_names(
    contents: Contents,
    services: LoadServices,
    names: Iterable[str],
    *,
    device: torch.device,
    writes: DeviceWrites | None,
) -> dict[str, Any]:
    """The values of ``names``; those that share their bytes come back as one tensor."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[object, str] = {}
    tied: dict[str, str] = {}
    leaves: list[str] = []
    metas = contents.names
    names = list(names)
    _warn_of_parts(contents, names)
    for name in names:
        meta = metas[name]
        if not is_raw(meta, name, contents):
            leaves.append(name)
            continue
        # of several chunks no one location tells
        is_one = len(meta.chunks) == 1
        location = contents.locations.get((name, meta.chunks[0].offsets)) if is_one else None
        # no bytes, and views of the same ones, are at one place whatever their shapes
        tie = (location, meta.size, meta.properties.dtype)
        if location is not None and stored.setdefault(tie, name) != name:
            tied[name] = stored[tie]
        else:
            # before memory is asked for: a damaged `.metadata` may promise any size
            check_room(name, meta, contents)
            tensors[name] = fresh_tensor(meta, contents.strides.get(name), device, writes=writes)
    regions = {name: [Region.whole(tensor)] for name, tensor in tensors.items()}
    failures = LoadFailures(contents, touched=False)
    values = await LoadPipeline(contents, services, failures, writes).read(regions, leaves)
    return values | tensors | {name: tensors[first] for name, first in tied.items()}


async def read_box(
    contents: Contents,
    services: LoadServices,
    name: str,
    index: Index,
    *,
    device: torch.device,
    writes: DeviceWrites | None,
) -> torch.Tensor:
    """What ``index`` means of the tensor ``name``; of one that is plain bytes no more is read than that, and
    the blocks around it that have checksums. Raises LoadError for one that can't be cut."""
    meta = tensor_meta(contents, name)
    box, rest = box_of(index, meta.size)
    if not is_raw(meta, name, contents):
        values = await read_names(contents, services, [name], device=device, writes=writes)
        return _cut(values[name], index, name, contents)
    _warn_of_parts(contents, [name])
    check_room(name, meta, contents)
    part = TensorStorageMetadata(meta.properties, torch.Size(extents(box)), [])
    tensor = fresh_tensor(part, None, device, writes=writes)
    await fill_box(contents, services, name, tensor, tuple(low for low, _ in box), writes=writes)
    return tensor[rest]


async def fill_box(
    contents: Contents,
    services: LoadServices,
    name: str,
    target: torch.Tensor,
    offsets: tuple[int, ...],
    *,
    writes: DeviceWrites | None,
) -> None:
    """Fill ``target``, which nobody else has seen, with what lies at ``offsets`` of the tensor ``name``, one
    of plain bytes."""
    failures = LoadFailures(contents, touched=False)
    pipeline = LoadPipeline(contents, services, failures, writes)
    await pipeline.read({name: [Region(target, offsets)]}, ())


def _warn_of_parts(contents: Contents, names: Iterable[str]) -> None:
    """A load compares shapes with the state's; who makes new tensors has nothing to compare with."""
    if open_ended := [name for name in names if name in contents.open_ended]:
        logger.warning(
            "checkpoint %r holds parts that ranks wrote, and nothing in it says of how many: should the last "
            "one's file be lost, tensors are shorter than they were (%s)",
            contents.info.checkpoint_id,
            ", ".join(f"{name} {tuple(contents.tensors[name].size)}" for name in open_ended[:3]),
        )


def _cut(value: torch.Tensor, index: Index, name: str, contents: Contents) -> torch.Tensor:
    try:
        return value[index]
    except BaseException as error:  # of the tensor's own class, which may raise anything
        if not is_foreign(error):
            raise
        raise LoadError(
            f"checkpoint {contents.info.checkpoint_id!r}: {name} is a {type(value).__name__} of "
            f"{value.layout}, which can't be cut so; read it whole",
            checkpoint_id=contents.info.checkpoint_id,
        ) from error


def check_index(contents: Contents, name: str, index: Index) -> None:
    """Raises LoadError for a name that is no tensor; IndexError, TypeError, ValueError for an index that
    can't be one of it."""
    box_of(index, tensor_meta(contents, name).size)


def tensor_meta(contents: Contents, name: str) -> TensorStorageMetadata:
    """What `.metadata` says of the tensor ``name``. Raises LoadError if it is none."""
    if (meta := contents.tensors.get(name)) is not None:
        return meta
    is_leaf = name in contents.names
    what = f"has no tensor as {name!r}; read() gives it" if is_leaf else f"holds nothing named {name!r}"
    raise LoadError(
        f"checkpoint {contents.info.checkpoint_id!r} {what}", checkpoint_id=contents.info.checkpoint_id
    )


def tensor_names(contents: Contents, keys: Collection[str] | None) -> list[str]:
    """The tensors at and below ``keys``, in the order in which they lie in the files. Raises LoadError for a
    key that means none."""

    def location_of(name: str) -> tuple[str, int, int]:
        chunks = contents.tensors[name].chunks
        # of one that has none, whoever reads it says so
        return contents.locations.get((name, chunks[0].offsets if chunks else None), ("", 0, 0))

    # a medium reads ahead in this order
    names = sorted(contents.tensors, key=location_of)
    globs = [Glob(key) for key in keys] if keys is not None else []
    for glob in globs:
        if not any(map(glob.matches, names)):
            raise LoadError(
                f"checkpoint {contents.info.checkpoint_id!r} holds no tensor named {glob.text!r}",
                checkpoint_id=contents.info.checkpoint_id,
            )
    return names if keys is None else [name for name in names if any(glob.matches(name) for glob in globs)]


_COPIES = 3
"""How often the bytes of an item are in memory at most while it is read that does not go straight into its
tensor: as they were read, decoded, and there."""
_DIRECT_BYTES = 1 << 20
"""From here on a raw chunk of whole rows is read straight into its tensor, but for its edges."""


def memory_for(contents: Contents, name: str) -> int:
    """Bytes of memory that reading the tensor ``name`` may take."""
    meta = tensor_meta(contents, name)
    nbytes = meta.size.numel() * meta.properties.dtype.itemsize
    files = {contents.locations.get((name, chunk.offsets), ("",))[0] for chunk in meta.chunks}
    # only of our files, which have checksums, and of bare ones are payloads at known places
    is_direct = (
        all(file in contents.digests or file in contents.bare for file in files)
        and name not in contents.quantised
        and is_raw(meta, name, contents)
        and nbytes >= _DIRECT_BYTES * len(meta.chunks)
        and all(chunk.sizes[1:] == meta.size[1:] for chunk in meta.chunks)
    )
    return nbytes if is_direct else _COPIES * nbytes


def batches(contents: Contents, names: Iterable[str], limit_bytes: int) -> Iterator[tuple[list[str], int]]:
    """(names, memory that reading them takes) of neighbours that are read together: within ``limit_bytes``,
    or one alone that takes more."""
    batch: list[str] = []
    total = 0
    for name in names:
        nbytes = memory_for(contents, name)
        if batch and total + nbytes > limit_bytes:
            yield batch, total
            batch, total = [], 0
        batch.append(name)
        total += nbytes
    if batch:
        yield batch, total


def _chosen(structure: Tree, keys: Collection[str], contents: Contents) -> Tree:
    """What of ``structure`` lies at or below ``keys``, which are names or patterns of names."""
    globs = [Glob(key) for key in keys]
    matched = {
        glob.text: [name for name in contents.names if glob.matches(name)]
        for glob in globs
        if glob.is_pattern
    }
    # a pattern that matches nothing may be a name that has such characters of its own
    plain = [glob.text for glob in globs if not matched.get(glob.text)]
    chosen, known = pruned(structure, [*plain, *itertools.chain.from_iterable(matched.values())])
    for key in plain:
        if key not in known:
            heads = [str(head) for head, _ in children_of(structure)]
            raise LoadError(
                f"checkpoint {contents.info.checkpoint_id!r} holds nothing named {key!r}; "
                f"its names begin with {', '.join(heads[:10])}",
                checkpoint_id=contents.info.checkpoint_id,
            )
    return chosen
