"""A load that a planner of the user's decides on: DCP's protocol, over the engine's own reading.

Enters: an opened checkpoint, a LoadPlanner for this load alone, the state as DCP shows it. Leaves: what the
planner did with what it was given. Invariant: all ranks have planned, and trust has admitted every leaf,
before the first tensor of any rank is resolved; bytes are verified before a planner sees them.
Source: torch/distributed/checkpoint/planner.py, state_dict_loader.py and filesystem.py (the order of calls).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from .._foreign import PlannerError, checked, pickled_plan, planner_code
from .._geometry import box_at, slices
from ..catalog import Contents
from ..formats import ItemKey
from ..options import Dtypes
from ..state import Region
from .failures import LoadFailures
from .fit import check_fit
from .match import Match
from .operations import Loaded, LoadOptions
from .pipeline import LoadPipeline, LoadServices
from .place import copy_exotic
from .rank_agreement import Together
from .read_plan import ReadPlan
from .tensor_matching import is_raw

_GROUP_BYTES = 64 << 20
"""How much is read ahead of the planner: one item that is larger is read by itself."""


class LoadProtocol:
    """One rank's calls of a planner, in DCP's order. For one load, and one thread at a time."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner
        self.name = type(planner).__name__

    def local_plan(self, state: dict[str, Any], contents: Contents, *, is_coordinator: bool) -> bytes:
        """What goes to the coordinator. Raises PlannerError."""
        planner, method = self._planner, "create_local_plan"
        with planner_code(planner, "set_up_planner"):
            planner.set_up_planner(state, contents.metadata, is_coordinator)
        with planner_code(planner, method):
            plan = planner.create_local_plan()
        return pickled_plan(planner, method, checked(planner, method, plan, LoadPlan))

    def global_plans(self, messages: Sequence[bytes]) -> list[bytes]:
        """All ranks' plans -> each rank's; the coordinator alone calls it. Raises PlannerError."""
        planner, method = self._planner, "create_global_plan"
        plans = [pickle.loads(message) for message in messages]
        with planner_code(planner, method):
            made = planner.create_global_plan(plans)
        if not isinstance(made, (list, tuple)) or len(made) != len(plans):
            raise PlannerError(
                f"{self.name}.{method}() gave {type(made).__name__}, not a plan for each of the {len(plans)} "
                "ranks"
            )
        return [pickled_plan(planner, method, checked(planner, method, plan, LoadPlan)) for plan in made]

    def finish(self, answer: bytes) -> list[ReadItem]:
        """What this rank reads. Raises PlannerError."""
        with planner_code(self._planner, "finish_plan"):
            plan = self._planner.finish_plan(pickle.loads(answer))
        return checked(self._planner, "finish_plan", plan, LoadPlan).items

    def give_bytes(self, item: ReadItem, raw: bytes) -> None:
        """Raises PlannerError."""
        with planner_code(self._planner, "load_bytes"):
            self._planner.load_bytes(item, io.BytesIO(raw))

    def give_tensor(self, item: ReadItem, value: torch.Tensor, dtypes: Dtypes) -> None:
        """Copy ``value`` to where the planner wants it. Raises PlannerError."""
        with planner_code(self._planner, "resolve_tensor"):
            target = self._planner.resolve_tensor(item)
        name = item.dest_index.fqn
        target = checked(self._planner, "resolve_tensor", target, torch.Tensor)
        if target.layout is torch.strided:  # that of a sparse tensor is a copy, which nobody would see
            target = target.detach()
        if target.shape != value.shape:
            raise PlannerError(
                f"{self.name}.resolve_tensor() gave a tensor of {tuple(target.shape)} for {name}, and its "
                f"plan reads {tuple(value.shape)}"
            )
        if dtypes == "exact" and target.dtype != value.dtype:
            raise PlannerError(
                f"{self.name}.resolve_tensor() gave {target.dtype} for {name}, which was saved as "
                f"{value.dtype}; dtypes='convert' casts"
            )
        # whatever the tensors were made in: a copy past autograd
        with torch.inference_mode(target.is_inference()), torch.no_grad():
            copy_exotic(name, target, value)
        with planner_code(self._planner, "commit_tensor"):
            self._planner.commit_tensor(item, target)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A ReadItem, and the stored item that it is of."""

    item: ReadItem
    key: ItemKey
    meta: TensorStorageMetadata | None
    """None of what is no tensor."""

    @property
    def nbytes(self) -> int:
        """How much memory its value takes; 0 of leaves, which are read before."""
        if self.meta is None:
            return 0
        return torch.Size(self.item.lengths).numel() * self.meta.properties.dtype.itemsize


class PlannedLoad:
    """One load of one checkpoint."""

    def __init__(
        self,
        contents: Contents,
        planner: LoadPlanner,
        services: LoadServices,
        how: LoadOptions,
        ranks: Together,
    ) -> None:
        self._contents = contents
        self._protocol = LoadProtocol(planner)
        self._services = services
        self._how = how
        self._ranks = ranks
        self._failures = LoadFailures(contents, touched=False)
        self._pipeline = LoadPipeline(contents, services, self._failures)
        self._leaves: dict[str, Any] = {}
        """The items of those that are no tensors, which trust has admitted."""

    async def run(self, state: dict[str, Any]) -> Loaded:
        """Let the planner load into ``state``. Ranks: all must call it. Raises PlannerError, LoadError."""
        run, protocol, ranks = self._services.threads.run, self._protocol, self._ranks

        async def decide(messages: Sequence[bytes]) -> list[bytes]:
            return await run(protocol.global_plans, messages)

        plan = await run(
            partial(protocol.local_plan, state, self._contents, is_coordinator=ranks.is_coordinator)
        )
        items = await run(protocol.finish, await ranks.planned(plan, decide))
        wanted = self._in_files(items)
        unexpected = await self._unread(wanted)
        # leaves before any tensor: trust has to see all of them while targets are as they were
        nbytes = await self._pipeline.read_wanted(partial(self._want_leaves, wanted))
        await self._check_trust(wanted)
        # no rank writes before every rank has planned and checked
        await ranks.ready()
        self._failures.touched = True
        for group in _groups(wanted):
            values: dict[int, torch.Tensor] = {}
            nbytes += await self._pipeline.read_wanted(partial(self._want_tensors, group, values))
            await run(self._give, group, values)
        return Loaded(unexpected=tuple(unexpected), nbytes=nbytes)

    async def _unread(self, wanted: Sequence[_Wanted]) -> list[str]:
        """What no rank's plan reads, below the top-level names that plans read. Raises IncompatibleStateError
        if all must fit: DCP's planner says nothing of an optimizer's state that is left behind."""
        names = {one.key[0] for one in wanted}
        heads = {name.partition(".")[0] for name in names}
        unread = [
            name
            for name in self._contents.metadata.state_dict_metadata
            if name not in names and name.partition(".")[0] in heads
        ]
        unexpected = await self._ranks.unexpected(unread, heads)
        if self._how.strict:
            check_fit(Match(), self._contents.info.checkpoint_id, unexpected=unexpected)
        return unexpected

    def _in_files(self, items: Sequence[ReadItem]) -> list[_Wanted]:
        """``items`` file by file, as stock reads them. Raises PlannerError for what the checkpoint lacks."""
        by_file: dict[str, list[_Wanted]] = {}
        for item in items:
            wanted = self._wanted(item)
            by_file.setdefault(self._contents.locations[wanted.key][0], []).append(wanted)
        return [wanted for some in by_file.values() for wanted in some]

    def _wanted(self, item: ReadItem) -> _Wanted:
        index, who = item.storage_index, f"{self._protocol.name}: its plan reads {item.storage_index.fqn}"
        meta = self._contents.metadata.state_dict_metadata.get(index.fqn)
        if meta is None:
            raise PlannerError(f"{who}, which the checkpoint does not hold")
        is_tensor = isinstance(meta, TensorStorageMetadata)
        if is_tensor != (item.type is LoadItemType.TENSOR):
            raise PlannerError(f"{who} as {item.type.name}, which it is not")
        if not isinstance(meta, TensorStorageMetadata):
            key: ItemKey = (index.fqn, None)
        else:
            offsets = meta.chunks[0].offsets if index.offset is None and meta.chunks else index.offset
            chunk = next((chunk for chunk in meta.chunks if chunk.offsets == offsets), None)
            if chunk is None:
                raise PlannerError(f"{who} at {index.offset}, where no chunk begins")
            # not strict: lengths that do not fit are the planner's error, told below
            ends = [first + count for first, count in zip(item.storage_offsets, item.lengths, strict=False)]
            fits = len(item.storage_offsets) == len(item.lengths) == len(chunk.sizes)
            is_inside = (
                fits and min(item.storage_offsets, default=0) >= 0 and min(item.lengths, default=0) >= 0
            )
            if not is_inside or any(end > size for end, size in zip(ends, chunk.sizes, strict=True)):
                raise PlannerError(f"{who} outside of its chunk of {tuple(chunk.sizes)}")
            key = (index.fqn, chunk.offsets)
        if key not in self._contents.locations:
            raise PlannerError(f"{who}, and nothing says where that lies")
        return _Wanted(item, key, meta if isinstance(meta, TensorStorageMetadata) else None)

    def _want_leaves(self, wanted: Sequence[_Wanted], plan: ReadPlan) -> None:
        for name in dict.fromkeys(one.key[0] for one in wanted if one.meta is None):
            plan.want_bytes(name, self._leaves.__setitem__)

    async def _check_trust(self, wanted: Sequence[_Wanted]) -> None:
        """A planner unpickles what it is given, as DCP's own does without a look; so nothing that trust would
        refuse is given to it."""
        if self._services.trust.unsafe:
            return
        plan = ReadPlan(self._pipeline.source)
        for one in wanted:
            if one.meta is not None and not is_raw(one.meta, one.key[0], self._contents):
                plan.want_item(one.key, one.meta.size, lambda value: None)
        with self._failures.explained():
            await self._pipeline.judge(plan.items)

    def _want_tensors(
        self, group: Sequence[_Wanted], values: dict[int, torch.Tensor], plan: ReadPlan
    ) -> None:
        for number, one in enumerate(group):
            if one.meta is None:
                continue
            first, lengths = one.item.storage_offsets, torch.Size(one.item.lengths)
            name, chunk_at = one.key
            assert chunk_at is not None
            if is_raw(one.meta, name, self._contents):
                # not the planner's target, though it costs a copy: that shall see no byte that was not
                # verified
                values[number] = torch.empty(lengths, dtype=one.meta.properties.dtype, device="cpu")
                offsets = tuple(low + offset for low, offset in zip(chunk_at, first, strict=True))
                plan.want_tensor(name, [Region(values[number], offsets)])
                continue
            sizes = next(chunk.sizes for chunk in one.meta.chunks if chunk.offsets == chunk_at)
            plan.want_item(one.key, sizes, _part_receiver(values, number, first, lengths, sizes))

    def _give(self, group: Sequence[_Wanted], values: dict[int, torch.Tensor]) -> None:
        for number, one in enumerate(group):
            if one.meta is None:
                self._protocol.give_bytes(one.item, self._leaves[one.key[0]])
            else:
                # taken out: what has been copied is of no use any more
                self._protocol.give_tensor(one.item, values.pop(number), self._how.dtypes)


def _part_receiver(
    values: dict[int, torch.Tensor], number: int, first: Sequence[int], lengths: torch.Size, sizes: torch.Size
) -> Callable[[Any], None]:
    def receive(value: Any) -> None:
        # not every layout can be cut, and what is read whole need not be
        values[number] = value if lengths == sizes else value[slices(box_at(first, lengths))]

    return receive


def _groups(wanted: Sequence[_Wanted]) -> Iterator[list[_Wanted]]:
    """What is read at once, in the order in which the planner gets it."""
    group: list[_Wanted] = []
    nbytes = 0
    for one in wanted:
        if group and nbytes + one.nbytes > _GROUP_BYTES:
            yield group
            group, nbytes = [], 0
        group.append(one)
        nbytes += one.nbytes
    if group:
        yield group
