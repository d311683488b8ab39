"""Leaves that are pickled and lie on a device: brought to the host together, in the order of the queue."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, SaveError, Stager, StagingOptions
from dcp_async.state import leaf_storages
from dcp_async.state.leaves import LeafPickler
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same
from tests.support.saves import saved


def sparse(values: torch.Tensor) -> torch.Tensor:
    indices = torch.arange(values.numel())[None]
    return torch.sparse_coo_tensor(
        indices, values, (2 * values.numel(),), is_coalesced=True, check_invariants=False
    )


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "sparse": sparse,
    "a tuple": lambda tensor: (tensor, 3),
    "a tuple with a dict": lambda tensor: ({"deep": [tensor[:2], tensor[2:]]}, "x"),
    "a parameter in a tuple": lambda tensor: (torch.nn.Parameter(tensor),),
}


def values_of(leaf: Any) -> list[float]:
    if isinstance(leaf, torch.Tensor):
        return [float(value) for value in (leaf._values() if leaf.is_sparse else leaf.detach())]
    if isinstance(leaf, dict):
        return values_of(list(leaf.values()))
    if isinstance(leaf, (tuple, list)):
        return [value for entry in leaf for value in values_of(entry)]
    return []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [False, True])
async def test_a_leaf_holds_what_was_queued_before_the_save_and_nothing_later(
    root: Path, kind: str, overlap: bool
) -> None:
    fake = FakeAccelerator()
    tensors = [fake.tensor(torch.zeros(10)) for _ in range(20)]
    state = {f"leaf{number}": KINDS[kind](tensor) for number, tensor in enumerate(tensors)}
    stream = fake.new_stream(fake.all_devices[0])
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(root, staging=stager) as engine,
    ):
        for step in (1, 2):
            with fake.on_stream(stream):
                for tensor in tensors:
                    fake.fill(tensor, float(step))
                response = await engine.save(state, step=step)
                for tensor in tensors:
                    fake.fill(tensor, 100.0)
            await response.upload_completion
            read = await engine.read(step)
            assert {value for leaf in read.values() for value in values_of(leaf)} == {float(step)}
    # a batch for all of them, where torch.save would have made a blocking copy of each
    assert stream.copies == [20, 20]


async def test_a_list_that_holds_itself_is_left_to_the_pickler(root: Path) -> None:
    fake = FakeAccelerator()
    fake.empty(1)
    loop: list[Any] = [3]
    loop.append(loop)
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, {"leaf": (loop,)})
        assert (await engine.read())["leaf"][0][1][1][0] == 3


async def test_a_leaf_on_a_device_is_refused_inside_of_a_capture(root: Path) -> None:
    fake = FakeAccelerator()
    state = {"leaf": (fake.tensor(torch.zeros(10)), 1)}
    stream = fake.new_stream(fake.all_devices[0])
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        with (
            fake.on_stream(stream),
            fake.capturing(stream),
            pytest.raises(SaveError, match="graph is being captured"),
        ):
            await engine.save(state)


def fetch_all(sources: Sequence[torch.Tensor], target_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    torch._foreach_copy_(list(map(target_of, sources)), list(sources))


def test_an_item_is_the_one_that_torch_would_have_made() -> None:
    shared = torch.arange(12.0)
    leaf = (shared[:3], shared[3:], torch.nn.Parameter(torch.ones(2)), sparse(torch.ones(4)), 1, "x")

    expected = io.BytesIO()
    torch.save(leaf, expected)
    (item,) = LeafPickler(None, fetch_all).items(["x"], [leaf])
    assert item == expected.getvalue()


async def test_leaves_on_the_host_take_no_memory_beside_a_device(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, nbytes = FakeAccelerator(), []
    made_from = leaf_storages._fetched_from

    def counted(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        nbytes.append(storage.nbytes())
        return made_from(storage)

    monkeypatch.setattr(leaf_storages, "_fetched_from", counted)
    state = {"on host": (torch.zeros(1000),), "on device": (fake.tensor(torch.zeros(10)),)}
    async with Stager(backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, state)
    assert nbytes == [state["on device"][0].untyped_storage().nbytes()]


def test_an_item_names_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made_from = leaf_storages._fetched_from

    def from_a_device(storage: torch.UntypedStorage) -> torch.UntypedStorage:
        made: Any = made_from(storage)
        made.origin = torch.device("cuda", 3)
        fetched: torch.UntypedStorage = made
        return fetched

    monkeypatch.setattr(leaf_storages, "_fetched_from", from_a_device)
    leaf = (torch.arange(12.0), sparse(torch.ones(4)), torch.nn.Parameter(torch.ones(2)))
    (item,) = LeafPickler(None, fetch_all).items(["x"], [leaf])
    assert item.count(b"cuda:3") == 4
    read = torch.load(io.BytesIO(item), map_location="cpu", weights_only=False)
    assert_same(list(read), list(leaf))
