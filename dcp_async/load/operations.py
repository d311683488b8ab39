"""One load from an opened checkpoint: into a state that exists, or as fresh objects.

Enters: an opened checkpoint, and a state's Targets or the keys that are wanted. Leaves: what a Restorer hands
back, or objects. Invariant: everything that can be refused is refused before a target is touched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from .._concurrency import collection_paused
from .._foreign import FillError
from ..catalog import Contents
from ..errors import IncompatibleStateError
from ..formats import (
    InnerValue,
    build,
    folded,
    pickled_keys,
    take_apart,
    usable_paths,
)
from ..options import Dtypes
from ..state import PLAIN_TENSORS, ReadBack, Region, Targets, is_known_to_autograd, is_wrapper
from .aliases import NamedRegion, conflict
from .device_writes import DeviceWrites
from .failures import DamagedError, LoadFailures
from .fit import check_app_states, check_fit, check_groups, kept_options
from .keys import Keys
from .match import Match
from .matching import match_state
from .pipeline import LoadPipeline, LoadServices
from .rank_agreement import Together
from .selection import Selection
from .wrapped_load import Wrapped

_DCP_LENIENT = "planner=DefaultLoadPlanner(allow_partial_load=True)"
_Regions = Mapping[str, Sequence[Region]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What ``CheckpointEngine.load`` was asked for; see there."""

    selection: Selection
    strict: bool
    atomic: bool
    dtypes: Dtypes
    is_partial: bool = False
    """Whether the checkpoint may hold more than the state asks for, as for DCP; missing names stay errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One load's outcome: what a Restorer takes, and what the report says."""

    read: ReadBack | None = None
    """None if a planner has placed what was read."""
    writes: DeviceWrites | None = None
    """What is to be handed out in the caller's thread, before ``read`` is."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    nbytes: int


async def load_into(
    contents: Contents,
    targets: Targets,
    services: LoadServices,
    how: LoadOptions,
    *,
    refill: bool,
    ranks: Together,
    writes: DeviceWrites | None,
) -> Loaded:
    """Fill the targets' tensors and gather everything else that a Restorer hands back.

    Args:
        writes: what reaches targets on devices; None where there are none.
        refill: targets hold bytes of a corrupt checkpoint, so each must be filled.
        ranks: what the ranks tell each other.
    """
    failures = LoadFailures(contents, touched=refill)
    contents = await _unfolded(contents, {*targets.tensors, *targets.leaves}, services, failures)
    load = _LoadInto(contents, targets, services, how, failures, writes)
    match, unexpected = await load.match(ranks, refill=refill)
    return await load.run(match, unexpected, ranks)


class _LoadInto:
    """One load into a state."""

    def __init__(
        self,
        contents: Contents,
        targets: Targets,
        services: LoadServices,
        how: LoadOptions,
        failures: LoadFailures,
        writes: DeviceWrites | None,
    ) -> None:
        self._contents = contents
        self._name = contents.info.checkpoint_id
        self._targets = targets
        self._services = services
        self._how = how
        self._failures = failures
        self._writes = writes
        self._pipeline = LoadPipeline(contents, services, failures, writes)

    async def match(self, ranks: Together, *, refill: bool) -> tuple[Match, Sequence[str]]:
        """How state and checkpoint fit, and what no rank expects. Raises IncompatibleStateError."""
        with collection_paused():
            match = match_state(self._targets, self._contents, dtypes=self._how.dtypes, writes=self._writes)
        unexpected = await ranks.unexpected(match.unexpected, self._targets.prefixes)
        # bytes of a corrupt checkpoint must not stay in what is not filled now
        if self._how.strict or refill:
            is_surplus_refused = self._how.strict and not self._how.is_partial
            check_fit(
                match,
                self._name,
                unexpected=unexpected if is_surplus_refused else (),
                lenient=_DCP_LENIENT if self._how.is_partial else "strict=False",
            )
        return match, unexpected

    async def run(self, match: Match, unexpected: Sequence[str], ranks: Together) -> Loaded:
        """Read what ``match`` says, and put it where it belongs."""
        wrapped = Wrapped(
            regions={name: regions for name, regions in match.tensors.items() if _has_wrapper(regions)},
            like=match.like,
        )
        plain = {name: regions for name, regions in match.tensors.items() if name not in wrapped.regions}
        # before copies are made, and before a target is touched: it may refuse the load
        for group in match.aliases:
            await self._check_aliases(group)
        # atomic: everything is read and verified beside the state, at the cost of host memory for all of it
        into = self._copies(plain) if self._how.atomic else plain
        keys = Keys(self._services.trust, self._failures)
        # before anything is touched: a key may be of a class that is not trusted
        made = {key: keys.unpickle(key) for node in match.nodes.values() for key in pickled_keys(node)}
        values, kept, nbytes = await self._read(match, into, wrapped, ranks)
        self._tell_autograd(match)
        if self._how.atomic:
            await self._copy(plain, into)
        await self._copy_wrapped(wrapped)
        values |= match.fresh  # filled by now
        return Loaded(
            read=ReadBack(
                values=values,
                taken=self._taken(match, values, made),
                resized=match.resized,
                grown=match.grown,
                replaced=match.replaced,
                absent=match.absent,
            ),
            writes=self._writes,
            missing=(*match.missing, *match.kept, *kept),
            unexpected=tuple(unexpected),
            mismatched=tuple(match.mismatched),
            nbytes=nbytes,
        )

    async def _check_aliases(self, group: Sequence[NamedRegion]) -> None:
        """Read what belongs into targets that share memory, elsewhere. Raises IncompatibleStateError if it
        can't be in there together."""
        values = [torch.empty_like(region.tensor, device="cpu") for _, region in group]
        for (name, region), value in zip(group, values, strict=True):
            await self._pipeline.read({name: [Region(value, region.offsets)]}, ())
        if (names := conflict(group, values)) is not None:
            raise IncompatibleStateError(
                f"checkpoint {self._name!r} does not fit the state ({names[0]} and {names[1]} share memory "
                "in the state and were saved with different values, so one would overwrite the other); "
                "nothing was loaded. Untie them with clone(), or load one of them only",
                checkpoint_id=self._name,
            )

    async def _read(
        self, match: Match, into: _Regions, wrapped: Wrapped, ranks: Together
    ) -> tuple[dict[str, Any], list[str], int]:
        """(values of leaves, options that stay as they are, number of bytes), with ``into`` filled."""
        targets, atomic = self._targets, self._how.atomic
        fresh = {name: Region.all_of(name, tensor) for name, tensor in match.fresh.items()}
        with self._failures.explained():
            plan = self._pipeline.plan({**into, **fresh}, match.leaves, wrapped=wrapped)
            await self._pipeline.read_leaves(plan, fresh=atomic)
            check_groups(targets, plan.values, self._name)
            if self._how.strict:
                check_app_states(targets, self._contents, plan.values)
            kept = kept_options(targets, self._contents, plan.values)
            if not atomic:
                await ranks.ready()  # no rank writes before every rank has finished its checks
            await self._pipeline.fill(plan, fresh=atomic)
        if atomic:  # only now has every rank verified what it will copy
            await ranks.ready()
        return plan.values, kept, plan.nbytes

    def _tell_autograd(self, match: Match) -> None:
        """Bytes are written past autograd: whoever saved one of these for backward must notice."""
        wrappers = [self._targets.tensors[name] for name in match.tensors if name in self._targets.local]
        touched = [*_tensors_of(match.tensors), *filter(is_known_to_autograd, wrappers)]
        torch.autograd.graph.increment_version([tensor for tensor in touched if not tensor.is_inference()])

    def _copies(self, regions: _Regions) -> dict[str, list[Region]]:
        """Memory of our own beside each of ``regions``."""
        # a device may have no room for a second state; classes that know no devices are not asked for one
        place: dict[str, Any] = {} if self._writes is None else {"device": "cpu"}
        return {
            name: [Region(torch.empty_like(region.tensor, **place), region.offsets) for region in some]
            for name, some in regions.items()
        }

    async def _copy(self, plain: _Regions, copies: _Regions) -> None:
        if plain:
            names = [name for name, regions in plain.items() for _ in regions]
            await self._copy_all(names, _tensors_of(plain), _tensors_of(copies))

    async def _copy_wrapped(self, wrapped: Wrapped) -> None:
        if wrapped.targets:
            await self._copy_all(wrapped.names, wrapped.targets, wrapped.sources)

    async def _copy_all(
        self, names: Sequence[str], targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]
    ) -> None:
        try:
            await self._pipeline.copy(names, targets, sources)
        except FillError as error:
            self._failures.touched = True  # all that is left of the load is these copies
            raise self._failures.explain(error) from error

    def _taken(self, match: Match, values: Mapping[str, Any], keys: Mapping[Any, Any]) -> dict[str, Any]:
        """Name -> what was saved there, as it was saved."""
        targets = self._targets

        def value_of(name: str, objects: Collection[str]) -> Any:
            # an object inside of it stands there itself: its state comes by its own load_state_dict()
            if name in objects:
                return targets.statefuls[name][0]
            return values[name] if name in values else targets.tensors[name]

        return {
            name: build(node, partial(value_of, objects=match.objects.get(name, ())), keys.__getitem__, name)
            for name, node in match.nodes.items()
        }


def _has_wrapper(regions: Iterable[Region]) -> bool:
    # by type first, for most tensors are plain; no generator, which would cost more than that look
    return bool(
        [
            region
            for region in regions
            if type(region.tensor) not in PLAIN_TENSORS and is_wrapper(region.tensor)
        ]
    )


def _tensors_of(regions: _Regions) -> list[torch.Tensor]:
    return [region.tensor for some in regions.values() for region in some]


async def _unfolded(
    contents: Contents, wanted: Collection[str], services: LoadServices, failures: LoadFailures
) -> Contents:
    """``contents`` with those leaves of stock's taken apart that lie above ``wanted`` names."""
    if contents.manifest is not None:
        return contents
    leaves = (name for name, meta in contents.names.items() if isinstance(meta, BytesStorageMetadata))
    values = await LoadPipeline(contents, services, failures).read({}, folded(leaves, wanted))
    # as planner_data names what is inside of them, not as their names are cut at dots
    paths = usable_paths(contents.metadata)
    unfolded: dict[str, dict[str, InnerValue]] = {}
    for leaf, value in values.items():
        if isinstance(value, (Mapping, list)):
            try:
                unfolded[leaf] = dict(take_apart(value, leaf, paths.get(leaf, (leaf,)), wanted))
            except ValueError as error:
                damaged = DamagedError(f"{leaf} can't be taken apart: {error}", [leaf])
                raise failures.explain(damaged) from error
    return replace(contents, unfolded=unfolded)
