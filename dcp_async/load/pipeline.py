"""Loading, as coroutines joined by bounded queues.

    load   plan -[list of Span]-> read -[list of FetchBuffers]-> place -> restore()

Enters: an opened checkpoint and what is wanted of it. Leaves: filled tensors and leaf values, or an error
before anything was touched. Invariant: leaves are decoded, and pickled tensors are judged by their heads, so
that trust is decided before the first tensor is written to.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec

import anyio
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from .._concurrency import BlockingThreads, Pipe, collection_paused, first_failure, run_blocking
from .._foreign import ENDINGS, FillError, is_foreign, storage_errors, words
from .._geometry import CoverageError
from ..catalog import Contents
from ..coordination import RemoteFailure
from ..errors import (
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    UntrustedCheckpointError,
)
from ..formats import (
    PickledKey,
    Tree,
    UnsupportedError,
    build,
    children_of,
    folded,
    leaf_names,
    pickled_keys,
    pruned,
    take_apart,
    usable_paths,
)
from ..options import Dtypes
from ..state import PLAIN_TENSORS, ReadBack, Region, Targets, is_known_to_autograd, is_wrapper
from ..trust import MAX_ALIKE, Trust, UntrustedGlobal, load_pickle
from .aliases import conflict
from .fetch import Check, DamagedError, FetchBuffers, Span, make_batches, make_spans
from .fit import check_app_states, check_fit, check_groups, kept_options
from .matching import Match, fresh_tensor, is_raw, match_state
from .rank_agreement import Together
from .read_plan import Collector, Source, copy_exotic
from .room import check_room
from .wrapped_load import Wrapped, want_distributed

P = ParamSpec("P")
_QUEUE_BATCHES = 2

BeforeTouch = Callable[[Mapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadServices:
    """What the engine lends to its loads."""

    threads: BlockingThreads
    part_bytes: int
    io_concurrency: int
    timeout: float
    trust: Trust


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What ``CheckpointEngine.load`` was asked for; see there."""

    strict: bool
    atomic: bool
    dtypes: Dtypes


@dataclass(frozen=True, slots=True)
class Loaded:
    """One load's outcome: what a Restorer takes, and what the report says."""

    read: ReadBack
    match: Match
    nbytes: int


class LoadPipeline:
    """Reads what is wanted of one opened checkpoint."""

    def __init__(self, contents: Contents, services: LoadServices, *, touched: bool = False) -> None:
        """``touched``: targets hold bytes of another checkpoint, which was corrupt."""
        self._contents = contents
        self._services = services
        self._source = Source(
            tensors={
                name: meta for name, meta in contents.names.items() if isinstance(meta, TensorStorageMetadata)
            },
            places=contents.places,
            raw_files=frozenset(contents.digests),
            exotic=contents.exotic,
            transforms=contents.transforms,
            trust=services.trust,
        )
        self._touched = touched
        self._keys: dict[int, set[bytes]] = {}
        """Hash of a mapping's key -> the pickles of such keys."""

    async def read(
        self,
        tensors: Mapping[str, Iterable[Region]],
        leaves: Iterable[str],
        *,
        fresh: bool,
        before_touch: BeforeTouch | None = None,
        wrapped: Wrapped | None = None,
    ) -> tuple[dict[str, Any], int]:
        """Fill ``tensors``; gives (name -> value of each leaf, number of bytes).

        ``fresh``: nobody else has seen ``tensors``, so a failure leaves nothing half loaded. ``before_touch``
        gets the leaves' values and is awaited before the first tensor is written to. ``wrapped``: what is
        made of other tensors; nothing of it is written to here.

        Raises: CorruptCheckpointError, IncompatibleStateError, UntrustedCheckpointError. Cancellation: joins
        the reads in progress; targets may be partly filled.
        """
        values: dict[str, Any] = {}
        name = self._contents.info.checkpoint_id
        try:
            heads, doubtful = Collector(self._source), Collector(self._source)
            small, large = Collector(self._source), Collector(self._source)
            inside: list[tuple[str, torch.Tensor, torch.Tensor]] = []
            with collection_paused():
                for leaf in leaves:
                    if (part := self._contents.part(leaf)) is not None:
                        values[leaf] = part.value
                    elif wrapped is not None and leaf in wrapped.like:
                        want_distributed(small, leaf, wrapped.like[leaf], values)
                    else:
                        small.want_leaf(leaf, values.__setitem__)
                for fqn, regions in tensors.items():
                    if (part := self._contents.part(fqn)) is not None:
                        inside += [(fqn, region.tensor, region.of(part.value)) for region in regions]
                    else:
                        large.want_tensor(fqn, regions)
                if wrapped is not None:
                    for fqn, regions in wrapped.regions.items():
                        small.want_pairs(fqn, regions, wrapped.hold)
            if not (fresh or self._services.trust.unsafe):  # else nothing is at stake, or nothing is refused
                for item in large.items:
                    heads.want_head(item, doubtful)
            for collector in (heads, doubtful, small):
                await self._flow(collector)
            if before_touch is not None:
                await before_touch(values)
            self._touched = self._touched or not fresh
            await self._flow(large)
            if inside:
                await self._services.threads.run(_copy_all, *zip(*inside, strict=True))
        except ENDINGS:
            raise
        except BaseException as error:  # what it reads into, and what reads, may be the trainer's own
            cause = first_failure(error)
            explained = self._explain(cause, name)
            if explained is cause:
                raise cause from None
            raise explained from cause
        return values, small.nbytes + large.nbytes

    async def unfold(self, wanted: Collection[str]) -> None:
        """Take apart leaves of stock's that lie above ``wanted`` names. Raises as ``read`` does."""
        contents = self._contents
        if contents.manifest is not None:
            return
        leaves = (name for name, meta in contents.names.items() if isinstance(meta, BytesStorageMetadata))
        values, _ = await self.read({}, folded(leaves, wanted), fresh=True)
        paths = usable_paths(contents.metadata)
        for leaf, value in values.items():
            if isinstance(value, (Mapping, list)):
                try:
                    parts = dict(take_apart(value, leaf, paths.get(leaf, (leaf,)), wanted))
                except ValueError as error:
                    damaged = DamagedError(f"{leaf} can't be taken apart: {error}", [leaf])
                    raise self._explain(damaged, contents.info.checkpoint_id) from error
                contents.parts[leaf] = parts

    def unpickle(self, key: PickledKey) -> Any:
        """A key of a mapping, of its class if that is trusted. Raises UntrustedCheckpointError,
        CorruptCheckpointError."""
        if key.raw is None:
            return key.plain
        name = self._contents.info.checkpoint_id
        try:
            found = load_pickle(key.raw, self._services.trust)
            alike = self._keys.setdefault(hash(found), set())
            alike.add(key.raw)
            if len(alike) > MAX_ALIKE:
                raise ValueError("too many hash alike")
            return found
        except UntrustedGlobal as error:
            if key.plain is not None:
                return key.plain
            raise self._explain(error, name) from error
        except Exception as error:  # whatever a key of the user's own raises when it is hashed
            damaged = DamagedError(f"a mapping's key can't be one: {error}", [])
            raise self._explain(damaged, name) from error

    def _explain(self, error: BaseException, name: str) -> BaseException:
        state = "targets are partly overwritten" if self._touched else "nothing was loaded"
        if isinstance(error, UntrustedGlobal):
            short = error.name.rpartition(".")[2]
            narrow = f"it with Trust(safe_globals=({short},)), or " if error.allowable else ""
            return UntrustedCheckpointError(
                f"checkpoint {name!r}: a leaf names {error.name}; {state}. If you trust it, allow "
                f"{narrow}anything with Trust(unsafe=True)",
                checkpoint_id=name,
            )
        if isinstance(error, UnsupportedError):
            return LoadError(f"checkpoint {name!r}: {error}; {state}", checkpoint_id=name)
        if isinstance(error, CoverageError) and self._contents.is_merged:
            # each rank of stock's wrote its own metadata, and one is missing
            return CorruptCheckpointError(
                f"checkpoint {name!r} is not whole: {error}; {state}. Load an older checkpoint",
                checkpoint_id=name,
                partially_loaded=self._touched,
            )
        if isinstance(error, CoverageError):
            return IncompatibleStateError(f"checkpoint {name!r}: {error}; {state}", checkpoint_id=name)
        if isinstance(error, DamagedError):
            names = tuple(dict.fromkeys((*error.names, *self._names_in(error.file, error.ranges))))
            what = f" (in {', '.join(names[:5])}{' and more' if len(names) > 5 else ''})" if names else ""
            return CorruptCheckpointError(
                f"checkpoint {name!r} is corrupt: {error}{what}; {state}. Load an older checkpoint",
                checkpoint_id=name,
                partially_loaded=self._touched,
                tensors=names,
            )
        if isinstance(error, FillError):
            return LoadError(f"checkpoint {name!r}: {error}; {state}", checkpoint_id=name)
        if is_foreign(error) and not isinstance(
            error, (OSError, MemoryError, RemoteFailure)
        ):  # those know no culprit
            return LoadError(
                f"checkpoint {name!r}: reading it failed ({words(error)}); {state}", checkpoint_id=name
            )
        return error

    def failure(self, error: BaseException) -> BaseException:
        """The error of the tree for ``error``, with which all that is left of the load failed."""
        self._touched = True
        return self._explain(error, self._contents.info.checkpoint_id)

    def _names_in(self, file: str, ranges: Iterable[tuple[int, int]]) -> list[str]:
        """Whose items overlap these bytes, wanted or not: a block is damaged for all that lies in it."""
        return [
            index.fqn
            for index, (stored_in, offset, length) in self._contents.places.items()
            if stored_in == file and any(offset < high and low < offset + length for low, high in ranges)
        ]

    async def _flow(self, collector: Collector) -> None:
        if not collector.pieces:
            return
        readers = self._services.io_concurrency
        batches: Pipe[list[Span]] = Pipe(_QUEUE_BATCHES)
        fetched: Pipe[list[FetchBuffers]] = Pipe(_QUEUE_BATCHES, producers=readers)
        async with anyio.create_task_group() as group:
            group.start_soon(self._plan, collector, batches)
            for _ in range(readers):
                group.start_soon(self._read, batches, fetched)
            group.start_soon(self._place, fetched)

    async def _plan(self, collector: Collector, batches: Pipe[list[Span]]) -> None:
        part_bytes = self._services.part_bytes
        digests, image_bytes = self._contents.digests, self._contents.image_bytes
        spans = make_spans(collector.pieces, digests, image_bytes, part_bytes=part_bytes)
        for batch in make_batches(spans, part_bytes=part_bytes):
            await batches.put(batch)
        await batches.close()

    async def _read(self, batches: Pipe[list[Span]], fetched: Pipe[list[FetchBuffers]]) -> None:
        async for batch in batches:
            with collection_paused():
                buffers = [FetchBuffers(span) for span in batch]
            segments = [segment for part in buffers for segment in part.segments]
            check = Check(buffers)
            try:
                await self._contents.reader.read_into(batch[0].file, segments, check.arrived)
            except (DamagedError, BaseExceptionGroup):  # found by ``check``, in the storage's own call
                raise
            except BaseException as error:
                with storage_errors("read", f"{batch[0].file} of {self._contents.info.checkpoint_id!r}"):
                    raise error from error.__cause__
            if not check.done:  # a storage need not say what has arrived
                await self._blocking(check.finish)
            if any(part.is_unfinished for part in buffers):
                await fetched.put(buffers)
        await fetched.close()

    async def _place(self, fetched: Pipe[list[FetchBuffers]]) -> None:
        async for buffers in fetched:
            await self._blocking(_scatter, buffers)

    async def _blocking(self, fn: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        await run_blocking(self._services.threads, self._services.timeout, fn, *args, **kwargs)


def _scatter(buffers: Iterable[FetchBuffers]) -> None:
    for part in buffers:
        try:
            part.scatter()
        except (DamagedError, CoverageError):
            raise
        except (ValueError, RuntimeError, TypeError) as error:
            raise DamagedError(str(error), [piece.name for piece in part.span.pieces]) from error
        except (FillError, UnsupportedError, UntrustedGlobal, *ENDINGS):
            raise
        except BaseException as error:
            names = tuple(dict.fromkeys(piece.name for piece in part.span.pieces))
            raise FillError(f"{', '.join(names[:5])}: {words(error)}", names) from error


async def load_into(
    contents: Contents,
    targets: Targets,
    services: LoadServices,
    how: LoadOptions,
    *,
    refill: bool,
    ranks: Together,
) -> Loaded:
    """Fill the targets' tensors and gather everything else that ``restore`` hands back.

    Args:
        refill: targets hold bytes of a corrupt checkpoint, so each must be filled.
        ranks: what the ranks tell each other.
    """
    pipeline = LoadPipeline(contents, services, touched=refill)
    await pipeline.unfold({*targets.tensors, *targets.leaves})
    with collection_paused():
        match = match_state(targets, contents, dtypes=how.dtypes)
    match.unexpected = await ranks.unexpected(match.unexpected, targets.prefixes)
    if how.strict or refill:
        check_fit(match, contents.info.checkpoint_id, unexpected=how.strict)
    wrapped = Wrapped(
        regions={
            name: regions
            for name, regions in match.tensors.items()
            if any(is_wrapper(region.tensor) for region in regions)
        },
        like=match.like,
    )
    plain = {name: regions for name, regions in match.tensors.items() if name not in wrapped.regions}
    for group in match.aliases:
        await _check_aliases(pipeline, group, contents.info.checkpoint_id)
    into = plain
    if how.atomic:
        into = {
            name: [Region(torch.empty_like(region.tensor), region.offsets) for region in regions]
            for name, regions in into.items()
        }
    keys = {key: pipeline.unpickle(key) for node in match.nodes.values() for key in pickled_keys(node)}

    async def before_touch(values: Mapping[str, Any]) -> None:
        check_groups(targets, values, contents.info.checkpoint_id)
        if how.strict:
            check_app_states(targets, contents, values)
        match.kept += kept_options(targets, contents, values)
        if not how.atomic:
            await ranks.ready()

    fresh = {name: Region.all_of(name, tensor) for name, tensor in match.fresh.items()}
    values, nbytes = await pipeline.read(
        {**into, **fresh}, match.leaves, fresh=how.atomic, before_touch=before_touch, wrapped=wrapped
    )
    if how.atomic:  # only now has every rank verified what it will copy
        await ranks.ready()
    filled = _tensors_of(match.tensors)
    # bytes were written past autograd: whoever saved one of these for backward must notice
    wrappers = [targets.tensors[name] for name in match.tensors if name in targets.local]
    touched = [*filled, *filter(is_known_to_autograd, wrappers)]
    torch.autograd.graph.increment_version([tensor for tensor in touched if not tensor.is_inference()])
    copies: list[tuple[Sequence[str], Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
    if how.atomic and into:
        names = [name for name, regions in plain.items() for _ in regions]
        copies.append((names, _tensors_of(plain), _tensors_of(into)))
    if wrapped.targets:
        copies.append((wrapped.names, wrapped.targets, wrapped.sources))
    for copy in copies:
        try:
            await services.threads.run(_copy_all, *copy)
        except FillError as error:
            raise pipeline.failure(error) from error
    values |= match.fresh

    def value_of(name: str, objects: Collection[str]) -> Any:
        if name in objects:
            return targets.statefuls[name][0]
        return values[name] if name in values else targets.tensors[name]

    taken = {
        name: build(node, partial(value_of, objects=match.objects.get(name, ())), keys.__getitem__, name)
        for name, node in match.nodes.items()
    }
    read = ReadBack(
        values=values,
        taken=taken,
        resized=match.resized,
        grown=match.grown,
        replaced=match.replaced,
        absent=match.absent,
    )
    return Loaded(read, match, nbytes)


async def _check_aliases(
    pipeline: LoadPipeline, group: Sequence[tuple[str, Region]], checkpoint_id: str
) -> None:
    """Read what belongs into targets that share memory, elsewhere. Raises IncompatibleStateError if it can't
    be in there together."""
    values = [torch.empty_like(region.tensor) for _, region in group]
    for (name, region), value in zip(group, values, strict=True):
        await pipeline.read({name: [Region(value, region.offsets)]}, (), fresh=True)
    if (names := conflict(group, values)) is not None:
        raise IncompatibleStateError(
            f"checkpoint {checkpoint_id!r} does not fit the state ({names[0]} and {names[1]} share memory in "
            "the state and were saved with different values, so one would overwrite the other); nothing was "
            "loaded. Untie them with clone(), or load one of them only",
            checkpoint_id=checkpoint_id,
        )


def _tensors_of(regions: Mapping[str, Iterable[Region]]) -> list[torch.Tensor]:
    return [region.tensor for some in regions.values() for region in some]


def _copy_all(names: Iterable[str], targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> None:
    at_once: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    with torch.inference_mode():  # else tensors that were made in it could not be written to
        for name, target, source in zip(names, targets, sources, strict=True):
            strided = target.layout is torch.strided and not target.is_quantized
            if strided and type(target) in PLAIN_TENSORS and not target.is_conj() and not target.is_neg():
                at_once[0].append(target)
                at_once[1].append(source)
            else:
                copy_exotic(name, target, source)
        if at_once[0]:
            torch._foreach_copy_(*at_once)


async def read_fresh(
    contents: Contents, services: LoadServices, *, keys: Iterable[str] | None, device: torch.device | str
) -> dict[str, Any]:
    """The checkpoint, or what lies at and below ``keys``, as fresh objects in the structure that was saved.

    Raises: LoadError for a key that is no name and no prefix of one.
    """
    structure = contents.structure
    if keys is not None:
        structure = _chosen(structure, dict.fromkeys(keys), contents)
    names = contents.names
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[tuple[str, int, int], str] = {}
    tied: dict[str, str] = {}
    leaves: list[str] = []
    for name in leaf_names(structure):
        meta = names[name]
        if is_raw(meta, name, contents):
            # names that share their bytes come back as one tensor
            place = contents.places.get(MetadataIndex(name, meta.chunks[0].offsets)) if meta.chunks else None
            if place is not None and len(meta.chunks) == 1 and stored.setdefault(place, name) != name:
                tied[name] = stored[place]
            else:
                check_room(name, meta, contents)
                tensors[name] = fresh_tensor(meta, contents.strides.get(name), device)
        else:
            leaves.append(name)
    pipeline = LoadPipeline(contents, services)
    regions = {name: [Region.whole(tensor)] for name, tensor in tensors.items()}
    values, _ = await pipeline.read(regions, leaves, fresh=True)
    found: dict[str, Any] = {**values, **tensors}
    found |= {name: tensors[first] for name, first in tied.items()}
    whole: dict[str, Any] = build(structure, found.__getitem__, pipeline.unpickle)
    return whole


def _chosen(structure: Tree, keys: Collection[str], contents: Contents) -> Tree:
    """What of ``structure`` lies at or below ``keys``."""
    chosen, found = pruned(structure, keys)
    for key in keys:
        if key not in found:
            heads = [str(head) for head, _ in children_of(structure)]
            raise LoadError(
                f"checkpoint {contents.info.checkpoint_id!r} holds nothing named {key!r}; "
                f"its names begin with {', '.join(heads[:10])}",
                checkpoint_id=contents.info.checkpoint_id,
            )
    return chosen
