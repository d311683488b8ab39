"""Pieces of a captured state's tensors, copied one behind the other while the state is held.

Enters: which pieces, a prepared state. Leaves: their bytes, elements in row-major order. Invariant: memory
that was freed since capture is not read, and what is made once fits each state of the structure, so that
later ones cost no step of Python per tensor that the kernel copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import add

import torch

from .._geometry import contiguous_strides, flat_slices
from ..state import Structure
from .prepared import Prepared
from .selection import Selection, picker
from .stager import Stager
from .vectored_copy import RefusedError, VectoredCopy

_ALIGN = 16
"""Where a piece in a buffer begins: the largest itemsize."""

Piece = tuple[int, int, int]
"""(index in the structure, first byte, number of bytes) of a run of a piece's elements."""


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
            # the gaps are hashed with the pieces, so they must be the same on every rank
            if start + nbytes != stop:
                memory[start + nbytes : stop] = bytes(stop - start - nbytes)
        self._structure = structure
        self._memory = torch.frombuffer(self.bytes, dtype=torch.uint8)
        self._flat: dict[torch.dtype, torch.Tensor] = {}
        self._small: list[int] = []
        """Which of the pieces the kernel copies."""
        self._rest: list[int] | None = None
        """Which of the pieces torch copies; None before anything was read."""
        self._vectored: VectoredCopy | None = None
        self._pick: Callable[[Sequence[int]], tuple[int, ...]] = picker([])
        self._lows: list[int] | None = None
        self._pointers: list[int] | None = None
        self._sources: Sequence[int] = ()
        """Where ``_vectored`` reads, as picked from ``_pointers``."""

    def fill(self, prepared: Prepared, stager: Stager) -> None:
        """Read all pieces. Raises: MutatedTensors, for memory that is not there any more."""
        vectored = (
            stager.copier.has_vectored_copy and prepared.captured.pointers is not None and not prepared.events
        )
        prepared.await_arrivals()
        # divided once, and anew only after the kernel has stopped copying for us
        if self._rest is None or (self._vectored is not None and not vectored):
            self._divide(vectored=vectored)
        try:
            self._copy_small(prepared)
        except RefusedError as error:
            # memory that is gone concerns this state alone, a call that is forbidden every later save
            small = Selection(self.pieces[number][0] for number in self._small)
            prepared.refuse(prepared.displaced(small))
            stager.copier.give_up_vectored_copy(error)
            self._divide(vectored=False)
        self._copy_rest(prepared, stager)

    def _divide(self, *, vectored: bool) -> None:
        """Decide who copies what."""
        strides = self._structure.strides
        self._small, self._rest, run_starts = [], [], []
        for number, (index, *_) in enumerate(self.pieces):
            if not vectored or strides[index] is not None:
                self._rest.append(number)
                continue
            if not self._small or self._small[-1] != number - 1:
                run_starts.append(len(self._small))
            self._small.append(number)
        self._vectored, self._pointers, self._sources = None, None, ()
        if self._small:
            self._pick = picker([self.pieces[number][0] for number in self._small])
            # in most saves all pieces are whole tensors, and then addresses need no step per tensor
            lows = [self.pieces[number][1] for number in self._small]
            self._lows = lows if any(lows) else None
            base = self._memory.data_ptr()
            targets = [base + self.starts[number] for number in self._small]
            lengths = [self.pieces[number][2] for number in self._small]
            self._vectored = VectoredCopy(targets, lengths, run_starts)

    def _copy_small(self, prepared: Prepared) -> None:
        if self._vectored is None:
            return
        pointers = prepared.captured.pointers
        assert pointers is not None
        if pointers is not self._pointers:  # with overlap=True a new list each time, mostly of the same
            sources = self._pick(pointers)
            if self._lows is not None:
                sources = tuple(map(add, sources, self._lows))
            if sources != self._sources:
                self._vectored.read_from(sources)
                self._sources = sources
            self._pointers = pointers
        self._vectored.copy(0, self._vectored.num_calls)

    def _copy_rest(self, prepared: Prepared, stager: Stager) -> None:
        if not self._rest:
            return
        rest = Selection(self.pieces[number][0] for number in self._rest)
        if prepared.watch is not None:  # of memory that was freed, only a crash would tell
            prepared.refuse(prepared.displaced(rest) | prepared.reshaped(rest))
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        try:
            for number in self._rest:
                for target, source in self._boxes(prepared.captured.tensors, number):
                    targets.append(target)
                    sources.append(source)
            stager.copier.copy_tensors(prepared.events, targets, sources)
        except (RuntimeError, IndexError):
            # a tensor that was resized meanwhile fails in torch's words: say which one was changed
            prepared.refuse(prepared.changed(rest) | prepared.reshaped(rest))
            raise

    def _boxes(
        self, tensors: Sequence[torch.Tensor], number: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) of a piece."""
        index, low, nbytes = self.pieces[number]
        dtype, shape = self._structure.dtypes[index], self._structure.shapes[index]
        if dtype not in self._flat:
            self._flat[dtype] = self._memory.view(dtype)
        flat, size = self._flat[dtype], dtype.itemsize
        base = self.starts[number] // size
        source = tensors[index].detach()
        if nbytes == shape.numel() * size:
            yield flat.as_strided(shape, contiguous_strides(shape), base), source
            return
        first = low // size
        for box, begin, end in flat_slices(shape, first, first + nbytes // size):
            piece = source[box]
            yield flat[base + begin - first : base + end - first].view(piece.shape), piece

    def piece(self, number: int) -> memoryview:
        """The bytes of a piece."""
        start = self.starts[number]
        return memoryview(self.bytes)[start : start + self.pieces[number][2]]

    def span(self, first: int, stop: int) -> memoryview:
        """The bytes of pieces [first, stop), and the zeros between them."""
        return memoryview(self.bytes)[self.starts[first] : self.starts[stop]]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
