"""Two checkpoints side by side: what is in one alone, and how far the tensors of both lie apart.

Enters: two paths. Leaves: a Comparison. Invariant: memory is bounded whatever the checkpoints hold: both are
streamed, and a tensor whose partner does not come in time is read again later, by itself.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..engine import Checkpoint, open_checkpoint
from ..errors import CheckpointNotFoundError, LoadError
from ..trust import Trust
from .contents import matches

_WAITING_BYTES = 256 << 20
"""What may wait for its partner. Two saves of one model lie in one order, so that mostly nothing does."""
_STEP_ELEMENTS = 1 << 15
"""How many elements are compared at once, in double precision: what the processor's caches hold, and torch
does not spread over threads, which on a busy machine would wait for each other for most of the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """How far one tensor's values lie apart."""

    name: str
    shape: tuple[int, ...]
    numel: int
    num_changed: int
    """Elements that differ; two that are no numbers do not."""
    max_abs: float
    """The largest difference of an element; NaN if one of the two is no number."""
    relative: float
    """The Euclidean length of the difference over that of A's tensor; infinite if that is 0."""


@dataclass(slots=True, kw_only=True)
class Comparison:
    """How two checkpoints differ."""

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    changed: list[dict[str, Any]] = field(default_factory=list)
    """Another shape or dtype, or a tensor in one and another leaf in the other."""
    moved: list[Moved] = field(default_factory=list)
    leaves: list[dict[str, Any]] = field(default_factory=list)
    """Other leaves whose values differ, each as text."""
    not_compared: list[dict[str, str]] = field(default_factory=list)
    """Names, and why nothing can be said of their values."""
    num_equal: int = 0
    """Tensors of equal values, or, without values, of one shape and dtype."""

    @property
    def identical(self) -> bool:
        """Whether nothing differs, as far as it was compared."""
        return not (self.only_in_a or self.only_in_b or self.changed or self.moved or self.leaves)

    def document(self) -> dict[str, Any]:
        """All of it as a JSON document has it."""
        return {"identical": self.identical, **asdict(self)}


async def compare(
    a_path: str,
    b_path: str,
    patterns: Sequence[str],
    *,
    values: bool,
    follow_links: bool,
    progress: Callable[[int, int], None],
) -> Comparison:
    """How the checkpoint ``b_path`` differs from ``a_path``. Raises: as for opening and reading them;
    CheckpointNotFoundError if ``patterns`` mean nothing in either."""
    trust = Trust(follow_links=follow_links)
    async with open_checkpoint(a_path, trust=trust) as a, open_checkpoint(b_path, trust=trust) as b:
        kinds_a, kinds_b = (_kinds(checkpoint, patterns) for checkpoint in (a, b))
        if patterns and not kinds_a and not kinds_b:
            raise CheckpointNotFoundError(
                f"nothing in {a_path} or {b_path} is called {' or '.join(patterns)}"
            )
        result = Comparison(
            only_in_a=[name for name in kinds_a if name not in kinds_b],
            only_in_b=[name for name in kinds_b if name not in kinds_a],
        )
        common = [name for name in kinds_a if name in kinds_b]
        result.changed = [
            {"name": name, "a": kinds_a[name], "b": kinds_b[name]}
            for name in common
            if kinds_a[name] != kinds_b[name]
        ]
        # another dtype does not keep values from being compared: it is what a conversion did to them
        tensors = [name for name in common if kinds_a[name]["shape"] == kinds_b[name]["shape"] is not None]
        leaves = [name for name in common if kinds_a[name]["shape"] is kinds_b[name]["shape"] is None]
        if not values:
            result.num_equal = sum(kinds_a[name] == kinds_b[name] for name in tensors)
            return result
        pairs = _Pairs(a, b, tensors)
        async with aclosing(pairs.run()) as run:
            async for name, tensor_a, tensor_b in run:
                _judge(result, name, tensor_a, tensor_b)
                progress(pairs.done_bytes, pairs.total_bytes)
        await _compare_leaves(result, a, b, leaves)
    return result


def _kinds(checkpoint: Checkpoint, patterns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Name -> shape and dtype; both None for a leaf that is no tensor."""
    known = checkpoint.metadata.state_dict_metadata
    kinds: dict[str, dict[str, Any]] = {}
    for name in checkpoint.names:
        if patterns and not any(matches(name, pattern) for pattern in patterns):
            continue
        meta = known.get(name)
        kinds[name] = {"shape": None, "dtype": None}
        if isinstance(meta, TensorStorageMetadata):
            dtype = str(meta.properties.dtype).removeprefix("torch.")
            kinds[name] = {"shape": list(meta.size), "dtype": dtype}
    return kinds


class _Pairs:
    """The tensors of two checkpoints, name by name. Owns its streams while it runs."""

    def __init__(self, a: Checkpoint, b: Checkpoint, names: Sequence[str]) -> None:
        self._checkpoints = (a, b)
        self._missing = dict.fromkeys(names)
        """Not yet compared."""
        self._waiting: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        self._waiting_bytes = 0
        self.done_bytes = 0
        self.total_bytes = sum(self._nbytes(side, name) for side in (0, 1) for name in names)

    async def run(self) -> AsyncGenerator[tuple[str, torch.Tensor, torch.Tensor], None]:
        """Each name once, with the tensor of A and that of B."""
        if not self._missing:
            return
        a, b = self._checkpoints
        async with aclosing(a.stream()) as stream_a, aclosing(b.stream()) as stream_b:
            streams = (stream_a, stream_b)
            open_sides = [0, 1]
            while open_sides and self._missing:
                # the side that has less ahead, so that both keep step
                side = min(open_sides, key=lambda side: len(self._waiting[side]))
                try:
                    name, tensor = await anext(streams[side])
                except StopAsyncIteration:
                    open_sides.remove(side)
                    continue
                if name not in self._missing:
                    continue
                self.done_bytes += self._nbytes(side, name)
                partner = self._waiting[1 - side].pop(name, None)
                if partner is None:
                    self._keep(side, name, tensor)
                    continue
                del self._missing[name]
                self._waiting_bytes -= self._nbytes(1 - side, name)
                yield (name, tensor, partner) if side == 0 else (name, partner, tensor)
        for name in list(self._missing):  # their partners came too late
            yield name, await a.tensor(name), await b.tensor(name)

    def _keep(self, side: int, name: str, tensor: torch.Tensor) -> None:
        waiting = self._waiting[side]
        waiting[name] = tensor
        self._waiting_bytes += self._nbytes(side, name)
        while self._waiting_bytes > _WAITING_BYTES and waiting:
            oldest = next(iter(waiting))
            del waiting[oldest]
            self._waiting_bytes -= self._nbytes(side, oldest)

    def _nbytes(self, side: int, name: str) -> int:
        """As its metadata says: a sparse tensor does not."""
        meta = self._checkpoints[side].metadata.state_dict_metadata[name]
        assert isinstance(meta, TensorStorageMetadata)
        return math.prod(meta.size) * meta.properties.dtype.itemsize


def _judge(result: Comparison, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    try:
        moved = movement(name, a, b)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # of a dtype or layout without arithmetic
        result.not_compared.append({"name": name, "why": str(error).partition("\n")[0]})
        return
    if moved.num_changed:
        result.moved.append(moved)
    else:
        result.num_equal += 1


def movement(name: str, a: torch.Tensor, b: torch.Tensor) -> Moved:
    """How far ``b`` lies from ``a``, of one shape. Raises what torch raises for what it can't subtract."""
    num_changed, largest, squares, squares_a = 0, 0.0, 0.0, 0.0
    # most often nothing has moved, or everything has: the first is told without any arithmetic
    is_equal = a.dtype == b.dtype and a.layout == b.layout == torch.strided and torch.equal(a, b)
    for part_a, part_b in () if is_equal else _steps(_plain(a), _plain(b)):
        apart = (part_b - part_a).abs()
        # equal ones count nothing, infinite ones and those that are no numbers too
        if not bool(apart.isfinite().all()):
            apart.masked_fill_((part_a == part_b) | (part_a.isnan() & part_b.isnan()), 0.0)
        num_changed += int(apart.count_nonzero())
        # NaN stays: max() of Python would lose it
        largest = float(torch.maximum(apart.max(), apart.new_tensor(largest)))
        squares += float(apart.square_().sum())
        squares_a += float(part_a.abs().square_().nan_to_num_(0.0).sum())
    relative = math.sqrt(squares) / math.sqrt(squares_a) if squares_a else math.inf if num_changed else 0.0
    return Moved(
        name=name,
        shape=tuple(a.shape),
        numel=a.numel(),
        num_changed=num_changed,
        max_abs=largest,
        relative=relative,
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    return (tensor.to_dense() if tensor.layout != torch.strided else tensor).reshape(-1)


def _steps(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    for start in range(0, a.numel(), _STEP_ELEMENTS):
        stop = start + _STEP_ELEMENTS
        yield a[start:stop].to(wide), b[start:stop].to(wide)


async def _compare_leaves(result: Comparison, a: Checkpoint, b: Checkpoint, names: Sequence[str]) -> None:
    for name in names:
        try:
            value_a, value_b = await a.read([name]), await b.read([name])
        except LoadError as error:  # a leaf that is not trusted is not opened for a look
            result.not_compared.append({"name": name, "why": str(error)})
            continue
        if not _is_equal(value_a, value_b):
            result.leaves.append({"name": name, "a": _text(value_a), "b": _text(value_b)})


def _is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and not movement("", a, b).num_changed
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:  # of an array, say: the answer is one too, or there is none
        return repr(a) == repr(b)


def _text(value: Any) -> str:
    """The leaf alone, without the containers that lead to it."""
    while isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
