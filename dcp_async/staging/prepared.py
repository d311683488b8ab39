"""A captured state on its way to be staged: what may change behind it was copied or is watched.

Enters: a Captured, in the trainer's thread and in the same piece as its capture. Leaves: Prepared, from which
the copying thread reads. Invariant: what a counter, an address or the sample tells to be other than at the
capture is never staged in silence; what none of them tells is listed in docs/howto/overlap.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.planner import SavePlanner

from ..state import Captured, versions_of
from .device import Event
from .packing import Located, Snapshot
from .selection import Selection
from .watch import MutatedTensors, MutationWatch


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A state, or a rank's share of one, that is to be staged."""

    captured: Captured
    events: dict[torch.device, Event]
    """Per accelerator, the moment of capture."""
    watch: MutationWatch | None
    """None while the trainer waits for staging: then nothing changes."""
    located: Located = ()
    """Where the tensors of the structure lie."""
    snapshots: dict[torch.device, Snapshot] = field(default_factory=dict)
    """What the small tensors of a device were copied to; shared with what a rank writes of it."""
    arrivals: Sequence[Event] = ()
    """Copies that the trainer queued into pinned host memory are done by then; none where nothing is
    pinned."""
    planner: SavePlanner | None = None
    """Decides on what is written of it; None where DCP's default one would."""
    indices: Sequence[int] | None = None
    """Where the tensors of a share stand in the structure; None if they are all of it."""

    def share(self, tensors: Sequence[int], leaves: Sequence[int]) -> Prepared:
        """What this rank writes, in the order in which it does: other ranks write the rest."""
        captured = self.captured.share(tensors, leaves)
        # a single rank writes all of it: no list is made anew in each of its saves
        if captured is self.captured:
            return self
        watch = self.watch.share(tensors) if self.watch is not None else None
        return dataclasses.replace(self, captured=captured, watch=watch, indices=tensors)

    def release(self) -> None:
        """Drop every reference to the trainer's tensors."""
        self.captured.release()
        self.planner = None  # it refers to the state
        # its layers are the trainer's tensors, too
        self.watch = None
        while self.snapshots:
            _, snapshot = self.snapshots.popitem()
            snapshot.release()

    def await_arrivals(self) -> None:
        """Return once host memory holds what the trainer had copied to it; in the thread that copies."""
        for event in self.arrivals:
            event.synchronize()

    def await_capture(self) -> None:
        """Return once the tensors hold what the trainer had queued for them; for a thread that may wait."""
        for event in self.events.values():
            event.synchronize()
        self.await_arrivals()

    def refuse_changes(self) -> None:
        """Raises MutatedTensors if any of the tensors is other than it was captured."""
        if self.watch is not None:
            everything = Selection(range(len(self.captured.tensors)))
            self.refuse(self.changed(everything) | self.reshaped(everything) | self.changed_unseen())

    @classmethod
    def of_made(cls, captured: Captured) -> Prepared:
        """What nobody else refers to, or whoever made it watches: it lies in host memory."""
        return cls(captured=captured, events={}, watch=None)

    def displaced(self, selection: Selection) -> set[int]:
        """Those that have other memory than was captured, or none."""
        known = self.watch.addresses if self.watch is not None else self.captured.pointers
        if known is None:  # the trainer waits
            return set()
        now = list(map(torch.Tensor.data_ptr, selection.pick(self.captured.tensors)))
        return selection.differing(now, selection.pick(known))

    def changed(self, selection: Selection) -> set[int]:
        """Those whose counters moved, or that lie elsewhere by now."""
        if self.watch is None:
            return set()
        now = versions_of(selection.pick(self.captured.tensors))
        # addresses as well as counters: a swapped `.data` moves no counter (docs/adr/0011)
        moved = selection.differing(now, selection.pick(self.watch.versions))
        wrapped = self.watch.wrappers_changed(selection.indices) | self.watch.dtensors_changed(selection)
        return moved | wrapped | self.displaced(selection)

    def changed_unseen(self) -> set[int]:
        """Those with other bytes although no counter of theirs moved."""
        return self.watch.changed_unseen(self.captured.tensors) if self.watch is not None else set()

    def reshaped(self, selection: Selection) -> set[int]:
        """Those that have another shape than was captured."""
        if self.watch is None:
            return set()
        now = [tensor.shape for tensor in selection.pick(self.captured.tensors)]
        return selection.differing(now, [self._shape(index) for index in selection.indices])

    def refuse(self, changed: Iterable[int]) -> None:
        """Raises MutatedTensors if there are any."""
        names = self.captured.structure.tensor_names
        if indices := sorted(changed):
            raise MutatedTensors([names[self._in_structure(index)] for index in indices])

    def _in_structure(self, index: int) -> int:
        return index if self.indices is None else self.indices[index]

    def _shape(self, index: int) -> torch.Size:
        return self.captured.structure.shapes[self._in_structure(index)]
