"""A data pipeline resumes with the sample that comes next, and its workers may be forked at any time."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from dcp_async import CheckpointEngine, RNGState
from tests.support.doubles import (
    MIB,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    mapped_arena_bytes,
    open_descriptors,
    random_tensor,
)
from tests.support.saves import HELD, saved
from tests.support.training_data import LENGTH, Counting, Growing, Numbers, Stream, Witness

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it

BATCH = 3
EPOCH = LENGTH // BATCH


class Feed:
    """A loader that starts a new epoch by itself where one ends, as a trainer does."""

    def __init__(self, make: Callable[[], Dataset[Any]], workers: int, *, shuffle: bool = True) -> None:
        options: dict[str, Any] = {}
        if shuffle:
            options = {"shuffle": True, "generator": torch.Generator().manual_seed(11)}
        self.loader: Any = StatefulDataLoader(make(), batch_size=BATCH, num_workers=workers, **options)
        self._epoch: Iterator[Any] | None = None

    def take(self, count: int) -> list[list[int]]:
        taken: list[list[int]] = []
        while len(taken) < count:
            if self._epoch is None:
                self._epoch = iter(self.loader)
            batch = next(self._epoch, None)
            if batch is None:
                self._epoch = None
            else:
                taken.append(batch.tolist())
        return taken

    def finish_epoch(self) -> list[list[int]]:
        """Also see that it is over: a loader has not ended before somebody asked for more."""
        epoch = iter(self.loader) if self._epoch is None else self._epoch
        rest = [batch.tolist() for batch in epoch]
        self._epoch = None
        return rest

    def resumed_from(self, data: Any, rng: Any) -> list[list[list[int]]]:
        """The next two epochs of a loader that was handed this state by nobody but the test."""
        self.loader.load_state_dict(data)
        RNGState().load_state_dict(rng)
        return [self.finish_epoch(), self.finish_epoch()]


@contextmanager
def feeds(count: int, *args: Any, **options: Any) -> Iterator[list[Feed]]:
    """Their workers have ended afterwards."""
    made = [Feed(*args, **options) for _ in range(count)]
    try:
        yield made
    finally:
        for feed in made:
            feed._epoch = None
            feed.loader._iterator = None
        gc.collect()


CASES: dict[str, tuple[Callable[[], Dataset[Any]], bool]] = {
    "shuffled": (Numbers, True),
    "in_order": (Numbers, False),
    "counting": (Counting, True),
    "stream": (Stream, False),
}


@pytest.mark.parametrize(
    ("kind", "workers", "consumed"),
    [
        *((kind, 0, consumed) for kind in CASES for consumed in (0, 1, 3)),
        *((kind, 2, 3) for kind in CASES),
        ("shuffled", 2, 0),
    ],
)
async def test_the_remaining_samples_come_exactly(root: Path, kind: str, workers: int, consumed: int) -> None:
    """Saved in the first epoch, resumed by a fresh loader, to the end of the second epoch."""
    make, shuffle = CASES[kind]
    with feeds(3, make, workers, shuffle=shuffle) as (whole, resumed, handed):
        async with CheckpointEngine(root) as engine:
            torch.manual_seed(1)
            whole.take(consumed)
            await saved(engine, {"data": whole.loader, "rng": RNGState()})
            copies = copy.deepcopy((whole.loader.state_dict(), RNGState().state_dict()))
            expected = [whole.finish_epoch(), whole.finish_epoch()]
            torch.manual_seed(2)
            await engine.load({"data": resumed.loader, "rng": RNGState()})
        taken = [resumed.finish_epoch(), resumed.finish_epoch()]
        assert taken[0] == expected[0]
        if workers == 0 and shuffle:
            # Without workers a loader draws from its generator once more than its state tells: what torchdata
            # itself makes of that state is what can be asked for here.
            expected[1] = handed.resumed_from(*copies)[1]
        assert taken[1] == expected[1]
    assert sum(map(len, expected[0])) == LENGTH - consumed * BATCH


@pytest.mark.parametrize("workers", [0, 2])
async def test_at_the_end_of_an_epoch_the_next_one_comes(root: Path, workers: int) -> None:
    with feeds(3, Numbers, workers) as (whole, resumed, handed):
        async with CheckpointEngine(root) as engine:
            torch.manual_seed(1)
            first = whole.finish_epoch()
            await saved(engine, {"data": whole.loader, "rng": RNGState()})
            copies = copy.deepcopy((whole.loader.state_dict(), RNGState().state_dict()))
            torch.manual_seed(2)
            await engine.load({"data": resumed.loader, "rng": RNGState()})
        taken = [resumed.finish_epoch(), resumed.finish_epoch()]
        assert taken == handed.resumed_from(*copies)
    assert taken[0] != first
    assert [len(epoch) for epoch in taken] == [EPOCH, EPOCH]


@pytest.mark.parametrize("workers", [0, 2])
async def test_in_the_second_epoch_the_rest_of_it_comes(root: Path, workers: int) -> None:
    with feeds(2, Numbers, workers) as (whole, resumed):
        async with CheckpointEngine(root) as engine:
            torch.manual_seed(1)
            whole.finish_epoch()
            whole.take(2)
            await saved(engine, {"data": whole.loader, "rng": RNGState()})
            expected = whole.finish_epoch()
            torch.manual_seed(2)
            await engine.load({"data": resumed.loader, "rng": RNGState()})
        assert resumed.finish_epoch() == expected
    assert len(expected) == EPOCH - 2


async def assert_rewinds(root: Path, feed: Feed, *, taken: int, more: int) -> None:
    """Saved after ``taken`` batches and loaded after ``more``, it gives those again."""
    async with CheckpointEngine(root) as engine:
        feed.take(taken)
        await saved(engine, {"data": feed.loader})
        expected = feed.take(more)
        feed._epoch = None
        await engine.load({"data": feed.loader})
    assert feed.take(more) == expected


@pytest.mark.parametrize("workers", [0, 2])
async def test_the_checkpoint_wins_over_a_loader_that_went_on(root: Path, workers: int) -> None:
    with feeds(1, Counting, workers) as (feed,):
        await assert_rewinds(root, feed, taken=2, more=4)


@pytest.mark.parametrize("workers", [0, 2])
async def test_a_dataset_whose_state_grows_comes_back(root: Path, workers: int) -> None:
    """Its fresh state has none of the names that were saved."""
    with feeds(2, Growing, workers) as (whole, resumed):
        async with CheckpointEngine(root) as engine:
            whole.take(3)
            await saved(engine, {"data": whole.loader})
            expected = whole.take(3)
            await engine.load({"data": resumed.loader})
        assert resumed.take(3) == expected


async def test_a_growing_state_is_rewound_in_place(root: Path) -> None:
    with feeds(1, Growing, 0) as (feed,):
        await assert_rewinds(root, feed, taken=1, more=3)


@pytest.mark.usefixtures("both_loops")
async def test_saving_between_batches_does_not_disturb_the_data(root: Path) -> None:
    with feeds(2, Counting, 2) as (plain, saving):
        torch.manual_seed(1)
        expected = plain.take(EPOCH + 2)
        torch.manual_seed(1)
        taken = []
        async with CheckpointEngine(root) as engine:
            for _ in range(EPOCH + 2):
                taken += saving.take(1)
                await engine.save({"data": saving.loader})
        assert taken == expected


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader], ids=lambda cls: cls.__name__)
@pytest.mark.usefixtures("both_loops")
async def test_workers_forked_while_a_save_is_in_flight_have_nothing_of_it(
    root: Path, faulty: FaultyStorage, loader: Callable[..., Any]
) -> None:
    """Neither the lease, which would outlive a parent that was killed, nor the pool's memory."""
    state = {"x": random_tensor(torch.uint8, (2 * MIB,), 1)}
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert sum(".lease-" in target for target in open_descriptors().values()) == 1
            assert mapped_arena_bytes() > 0
            batches = iter(loader(Witness(), batch_size=BATCH, num_workers=2))
            pids, leases, pool = map(torch.cat, zip(*batches, strict=True))
            del batches
            assert not response.staging_completion.done()
        await response.upload_completion
        assert_same(await engine.read(), state)
    assert len(set(pids.tolist())) == 2
    assert os.getpid() not in pids.tolist()
    assert (int(leases.sum()), int(pool.sum())) == (0, 0)
    assert_holds_only(root, ["step-00000000"])
    gc.collect()


async def test_workers_that_outlive_the_engine_do_no_harm(root: Path) -> None:
    """They were forked while it was open, and end when everything of it is gone."""
    with feeds(1, Numbers, 2) as (feed,):
        async with CheckpointEngine(root) as engine:
            before = feed.take(1)
            await saved(engine, {"data": feed.loader, "x": torch.ones(1000)}, step=1)
        rest = feed.finish_epoch()
    assert len({number for batch in before + rest for number in batch}) == LENGTH
    async with CheckpointEngine(root) as engine:
        assert_same((await engine.read())["x"], torch.ones(1000))
    assert_holds_only(root, ["step-00000001"])
