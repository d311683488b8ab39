"""Pieces of a captured state's tensors, copied one behind the other while the state is held.

Enters: which pieces, a captured state. Leaves: their bytes, elements in row-major order. Invariant: memory
that was freed since capture is not read, and what is made once fits each state of the structure, so that
later ones cost no step of Python per tensor that the kernel copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from operator import add, itemgetter
from typing import Any

import torch

from .._geometry import contiguous_strides, flat_slices
from ..state import Captured, Structure, versions_of
from .device import Event
from .stager import MutatedTensors, Stager
from .vectored_copy import Gather, RefusedError

_ALIGN = 16
"""Of a piece in a buffer: the largest itemsize."""

Piece = tuple[int, int, int]
"""(place in the structure, first byte, number of bytes) of a run of a piece's elements."""


class SideBuffer:
    """Pieces one behind the other; whatever reads them is made once, and fits each state of the structure."""

    def __init__(
        self, structure: Structure, pieces: Sequence[Piece], memory: bytearray | None = None
    ) -> None:
        """``memory`` is used if it is given and they fit in; what was there is overwritten."""
        self.starts = [0, *accumulate(_aligned(nbytes) for *_, nbytes in pieces)]
        self.pieces = pieces
        if memory is None or len(memory) < self.starts[-1]:
            memory = bytearray(self.starts[-1])
        self.bytes = memory
        for start, stop, (*_, nbytes) in zip(self.starts, self.starts[1:], pieces, strict=False):
            if start + nbytes != stop:
                memory[start + nbytes : stop] = bytes(stop - start - nbytes)
        self._structure = structure
        self._memory = torch.frombuffer(self.bytes, dtype=torch.uint8)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._gathered: list[int] = []
        self._rest: list[int] | None = None
        """Which of the pieces torch copies; None before anything was read."""
        self._gather: Gather | None = None
        self._pick = _picker([])
        self._lows: list[int] | None = None
        self._pointers: list[int] | None = None
        self._aimed: Sequence[int] = ()
        """Where ``_gather`` reads, as picked from ``_pointers``."""

    def fill(self, captured: Captured, stager: Stager, events: dict[torch.device, Event]) -> None:
        """Read all pieces. Raises: MutatedTensors, for memory that is not there any more."""
        gathers = stager.gathers and captured.pointers is not None and not events
        if self._rest is None or (self._gather is not None and not gathers):
            self._divide(gathers=gathers)
        try:
            self._copy_gathered(captured)
        except RefusedError as error:
            gathered = Places([self.pieces[at][0] for at in self._gathered])
            refuse_changed(self._structure, gathered.moved(captured))
            stager.gather_no_more(error)
            self._divide(gathers=False)
        self._copy_rest(captured, stager, events)

    def _divide(self, *, gathers: bool) -> None:
        """Decide who copies what."""
        strides = self._structure.strides
        self._gathered, self._rest, run_starts = [], [], []
        for at, (index, *_) in enumerate(self.pieces):
            if not gathers or strides[index] is not None:
                self._rest.append(at)
                continue
            if not self._gathered or self._gathered[-1] != at - 1:
                run_starts.append(len(self._gathered))
            self._gathered.append(at)
        self._gather, self._pointers, self._aimed = None, None, ()
        if self._gathered:
            self._pick = _picker([self.pieces[at][0] for at in self._gathered])
            lows = [self.pieces[at][1] for at in self._gathered]
            self._lows = lows if any(lows) else None
            base = self._memory.data_ptr()
            targets = [base + self.starts[at] for at in self._gathered]
            lengths = [self.pieces[at][2] for at in self._gathered]
            self._gather = Gather(targets, lengths, run_starts)

    def _copy_gathered(self, captured: Captured) -> None:
        if self._gather is None:
            return
        pointers = captured.pointers
        assert pointers is not None
        if pointers is not self._pointers:  # with overlap=True a new list each time, mostly of the same
            found = self._pick(pointers)
            if self._lows is not None:
                found = tuple(map(add, found, self._lows))
            if found != self._aimed:
                self._gather.aim(found)
                self._aimed = found
            self._pointers = pointers
        self._gather.copy(0, self._gather.num_calls)

    def _copy_rest(self, captured: Captured, stager: Stager, events: dict[torch.device, Event]) -> None:
        if not self._rest:
            return
        places = Places([self.pieces[at][0] for at in self._rest])
        # of memory that was freed, only a crash would tell
        refuse_changed(self._structure, places.moved(captured) | places.reshaped(captured))
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        try:
            for at in self._rest:
                for target, source in self._boxes(captured, at):
                    targets.append(target)
                    sources.append(source)
            stager.copy_tensors(events, targets, sources)
        except (RuntimeError, IndexError):
            refuse_changed(self._structure, places.changed(captured) | places.reshaped(captured))
            raise

    def _boxes(self, captured: Captured, at: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of a piece."""
        index, low, nbytes = self.pieces[at]
        dtype, shape = self._structure.dtypes[index], self._structure.shapes[index]
        if dtype not in self._flat:
            self._flat[dtype] = self._memory.view(dtype)
        flat, size = self._flat[dtype], dtype.itemsize
        base = self.starts[at] // size
        source = captured.tensors[index].detach()
        if nbytes == shape.numel() * size:
            yield flat.as_strided(shape, contiguous_strides(shape), base), source
            return
        first = low // size
        for box, begin, end in flat_slices(shape, first, first + nbytes // size):
            part = source[box]
            yield flat[base + begin - first : base + end - first].view(part.shape), part

    def piece(self, at: int) -> memoryview:
        """The bytes of a piece."""
        start = self.starts[at]
        return memoryview(self.bytes)[start : start + self.pieces[at][2]]

    def span(self, first: int, stop: int) -> memoryview:
        """The bytes of pieces [first, stop), and the zeros between them."""
        return memoryview(self.bytes)[self.starts[first] : self.starts[stop]]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Picks what stands at ``places``, in C."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple([values[place] for place in places])


class Places:
    """Some tensors of a structure, which each save looks at."""

    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = sorted(set(indices))
        self._pick = _picker(self.indices)

    def changed(self, captured: Captured) -> set[int]:
        """Those that are not what was captured, or lie elsewhere; no step of Python per tensor if there is
        none."""
        if captured.versions is None:  # the trainer waits
            return set()
        tensors = self._pick(captured.tensors)
        changed = self._differing(versions_of(tensors), self._pick(captured.versions))
        return changed | captured.watch.moved(self.indices) | self.moved(captured)

    def moved(self, captured: Captured) -> set[int]:
        """Those that have other memory than was captured, or none."""
        if captured.versions is None:
            return set()
        now = tuple(map(torch.Tensor.data_ptr, self._pick(captured.tensors)))
        if captured.pointers is not None:
            return self._differing(now, self._pick(captured.pointers))
        shapes = self._pick(captured.structure.shapes)
        return {
            index
            for index, address, shape in zip(self.indices, now, shapes, strict=True)
            if not address and shape.numel()
        }

    def reshaped(self, captured: Captured) -> set[int]:
        """Those that have another shape than was captured."""
        if captured.versions is None:
            return set()
        now = [tensor.shape for tensor in self._pick(captured.tensors)]
        return self._differing(now, self._pick(captured.structure.shapes))

    def _differing(self, now: Sequence[object], then: Sequence[object]) -> set[int]:
        now = tuple(now)
        if now == then:  # compared in C, since it is so nearly always
            return set()
        return {index for index, *pair in zip(self.indices, now, then, strict=True) if pair[0] != pair[1]}


def refuse_changed(structure: Structure, changed: Iterable[int]) -> None:
    """Raises MutatedTensors if there are any."""
    if names := [structure.tensor_names[index] for index in sorted(changed)]:
        raise MutatedTensors(names)
