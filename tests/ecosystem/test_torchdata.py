"""Loaders of torchdata: one starts when it is asked for its state, one has a dataset that keeps a buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from torchdata.nodes import Batcher, IterableWrapper, Loader, Prefetcher, SamplerWrapper
from torchdata.stateful_dataloader import StatefulDataLoader

from dcp_async import CheckpointEngine

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

LENGTH = 40


class Shuffled(IterableDataset[torch.Tensor]):
    """Draws from a buffer, which is empty at first, None after the end, and full in between."""

    def __init__(self, length: int, room: int = 8) -> None:
        self.length, self.room = length, room
        self.next = 0
        self.buffer: list[torch.Tensor] | None = []
        self.last: torch.Tensor | None = None
        self.counts: dict[int, int] = {}
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            buffer = self.buffer = self.buffer or []
            while self.next < self.length and len(buffer) < self.room:
                buffer.append(torch.full((3,), float(self.next)))
                self.next += 1
            if not buffer:
                return
            at = int(torch.randint(len(buffer), (), generator=self.generator))
            self.last = buffer.pop(at)
            self.counts[self.next] = len(buffer)
            yield self.last

    def state_dict(self) -> dict[str, Any]:
        return {
            "next": self.next,
            "buffer": self.buffer and list(self.buffer),
            "last": self.last,
            "counts": dict(self.counts),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next, self.buffer, self.last = state["next"], state["buffer"], state["last"]
        self.counts = state["counts"]
        self.generator.set_state(state["generator"])


async def gone_on(tmp_path: Path, make: Callable[[], Any], taken: int) -> tuple[Iterator[Any], Any]:
    """What a loader has left after ``taken`` items, and a fresh one that was loaded with its state."""
    one, fresh = make(), make()
    items = iter(one)
    for _ in range(taken):
        next(items)
    async with CheckpointEngine(tmp_path / "run") as engine:
        await engine.save({"data": one})
        await engine.wait()
        await engine.load({"data": fresh})
    return items, fresh


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 5, 19])
async def test_a_dataset_with_a_buffer_goes_on_where_it_was(tmp_path: Path, workers: int, taken: int) -> None:
    def make() -> Any:
        return StatefulDataLoader(Shuffled(LENGTH), batch_size=2, num_workers=workers)

    rest, fresh = await gone_on(tmp_path, make, taken)
    assert [batch.tolist() for batch in fresh] == [batch.tolist() for batch in rest]


def _batches() -> Any:
    return Batcher(IterableWrapper(range(LENGTH)), batch_size=4)


NODES: dict[str, Callable[[], Any]] = {
    "an iterable": lambda: IterableWrapper(range(LENGTH)),
    "batches": _batches,
    "prefetched": lambda: Prefetcher(_batches(), prefetch_factor=2),
    "a sampler": lambda: SamplerWrapper(range(LENGTH)),
}


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("kind", NODES)
async def test_a_loader_of_nodes_goes_on_where_it_was(tmp_path: Path, kind: str, taken: int) -> None:
    rest, fresh = await gone_on(tmp_path, lambda: Loader(NODES[kind]()), taken)
    assert list(fresh) == list(rest)
