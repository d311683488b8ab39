"""Kinds of targets on a device: parts of larger tensors, tied ones, those of ranks, what stock wrote, what
only torch's own operators fill."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcp_async import CheckpointEngine, IncompatibleStateError, PerRank, Stager, StagingOptions
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import FaultyStorage
from tests.support.saves import PART, saved

WHOLE = torch.arange(100 * 100, dtype=torch.float32).view(100, 100)
SMALL = StagingOptions(part_bytes=PART)


class Parts(torch.Tensor):
    """Some parts of a larger tensor, by stock's hooks."""

    parts: Mapping[tuple[int, ...], torch.Tensor]

    def __new__(cls, size: torch.Size, parts: Mapping[tuple[int, ...], torch.Tensor]) -> Parts:
        dtype = next(iter(parts.values())).dtype
        made: Parts = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype)
        made.parts = parts
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself asks for a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} would see some parts only")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), part.size()) for at, part in self.parts.items()]

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(next(iter(self.parts.values())))
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.parts[tuple(index.offset)]


@pytest.fixture
def fake() -> FakeAccelerator:
    return FakeAccelerator()


def zeros(fake: FakeAccelerator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A target on the device, with a kernel queued that would spoil what is loaded before it."""
    target = fake.tensor(torch.zeros(shape, dtype=dtype))
    fake.fill(target, 7)
    return target


async def loaded(
    fake: FakeAccelerator, root: Path, state: Mapping[str, Any], into: Any, **options: Any
) -> None:
    async with Stager(SMALL, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await saved(engine, state)
        await engine.load(into, **options)
        assert stager.pool.leased == 0
    fake.finish()


@pytest.mark.parametrize("atomic", [False, True])
async def test_parts_of_a_tensor_are_cut_out_of_what_was_saved_whole(
    root: Path, fake: FakeAccelerator, atomic: bool
) -> None:
    parts = {(10, 20): zeros(fake, 30, 40), (50, 0): zeros(fake, 20, 100), (0, 99): zeros(fake, 5, 1)}
    await loaded(fake, root, {"w": WHOLE}, {"w": Parts(WHOLE.size(), parts)}, atomic=atomic)
    for (row, column), part in parts.items():
        assert torch.equal(part, WHOLE[row : row + part.shape[0], column : column + part.shape[1]])


@pytest.mark.parametrize("columns", [False, True])
async def test_parts_that_were_saved_apart_are_put_together(
    root: Path, fake: FakeAccelerator, columns: bool
) -> None:
    halves = (
        {(0, 0): WHOLE[:, :37].clone(), (0, 37): WHOLE[:, 37:].clone()}
        if columns
        else {(0, 0): WHOLE[:37].clone(), (37, 0): WHOLE[37:].clone()}
    )
    into = {"w": zeros(fake, 100, 100)}
    await loaded(fake, root, {"w": Parts(WHOLE.size(), halves)}, into)
    assert torch.equal(into["w"], WHOLE)


async def test_parts_of_another_dtype_and_order_are_converted_on_the_device(
    root: Path, fake: FakeAccelerator
) -> None:
    halves = {(0, 0): WHOLE[:, :37].clone(), (0, 37): WHOLE[:, 37:].clone()}
    target = zeros(fake, 100, 100, dtype=torch.float64)
    await loaded(fake, root, {"w": Parts(WHOLE.size(), halves)}, {"w": target.t()}, dtypes="convert")
    assert torch.equal(target.t(), WHOLE.double())


async def test_dtensors_are_filled_where_their_local_part_lies(
    root: Path, fake: FakeAccelerator, mesh: DeviceMesh
) -> None:
    local = zeros(fake, 100, 100)
    into = {"w": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}
    await loaded(fake, root, {"w": WHOLE}, into)
    assert torch.equal(local, WHOLE)


async def test_device_entries_of_a_distributed_parameter_are_cut_and_made_as_it_is(
    root: Path, fake: FakeAccelerator, mesh: DeviceMesh
) -> None:
    def made() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        whole = DTensor.from_local(fake.tensor(torch.ones(8, 8)), mesh, [Shard(0)], run_check=False)
        parameter = torch.nn.Parameter(whole)
        return parameter, torch.optim.AdamW([parameter])

    parameter, optimizer = made()
    parameter.grad = parameter.detach().clone()
    optimizer.step()
    other, fresh = made()
    await loaded(fake, root, {"o": optimizer}, {"o": fresh})
    was, entry = optimizer.state[parameter], fresh.state[other]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(entry[key].to_local(), was[key].to_local())
        assert entry[key].placements == was[key].placements == (Shard(0),)
        assert fake.device_of(entry[key].to_local()) == fake.all_devices[0]


async def test_tied_targets_are_filled_once_and_contradictions_are_refused(
    root: Path, fake: FakeAccelerator
) -> None:
    target = zeros(fake, 100, 100)
    await loaded(fake, root, {"a": WHOLE, "b": WHOLE}, {"a": target, "b": target})
    assert torch.equal(target, WHOLE)
    tied = zeros(fake, 100, 100)
    fake.finish()
    with pytest.raises(IncompatibleStateError, match="share memory"):
        await loaded(fake, root / "other", {"a": WHOLE, "b": WHOLE + 1}, {"a": tied, "b": tied[:]})
    assert torch.equal(tied, torch.full((100, 100), 7.0))  # compared in host memory, and left alone


async def test_what_is_each_ranks_own_is_filled_on_its_device(root: Path, fake: FakeAccelerator) -> None:
    target = zeros(fake, 100, 100)
    await loaded(fake, root, {"p": PerRank(WHOLE)}, {"p": PerRank(target)})
    assert torch.equal(target, WHOLE)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")
@pytest.mark.parametrize("atomic", [False, True])
async def test_what_stock_wrote_is_brought_to_the_device(
    root: Path, fake: FakeAccelerator, atomic: bool
) -> None:
    dcp.save({"w": WHOLE, "n": {"b": WHOLE[0].clone()}}, checkpoint_id=root / "stock")
    into: dict[str, Any] = {"w": zeros(fake, 100, 100), "n": {"b": zeros(fake, 100)}}
    async with Stager(SMALL, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
        await engine.load(into, "stock", atomic=atomic)
    fake.finish()
    assert torch.equal(into["w"], WHOLE)
    assert torch.equal(into["n"]["b"], WHOLE[0])


async def test_order_what_only_torchs_operators_fill_is_filled_in_the_callers_thread(
    root: Path, fake: FakeAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those run on the current stream of their thread, and allocate from its memory."""
    state = {"w": torch.complex(WHOLE, -WHOLE)}
    target = fake.tensor(torch.zeros(100, 100, dtype=torch.complex64))
    threads: list[threading.Thread] = []
    copied = torch.Tensor.copy_

    def copy(to: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if to.is_conj():
            threads.append(threading.current_thread())
        return copied(to, value)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    await loaded(fake, root, state, {"w": target.conj()})
    assert torch.equal(target.conj().resolve_conj(), state["w"])
    assert set(threads) == {threading.current_thread()}


async def test_slots_of_a_load_that_is_cancelled_come_back_when_its_copies_are_done(
    faulty: FaultyStorage, fake: FakeAccelerator
) -> None:
    state = {f"w{index}": WHOLE + index for index in range(20)}
    into = {name: zeros(fake, 100, 100) for name in state}
    async with Stager(SMALL, backend=fake) as stager, CheckpointEngine(faulty, staging=stager) as engine:
        await saved(engine, state)
        with faulty.hold("read_into", nth=3) as gate:
            task = asyncio.ensure_future(engine.load(into))
            await gate.until_arrived()
            assert stager.pool.leased
            task.cancel()
            gate.release()
            with pytest.raises(asyncio.CancelledError):
                await task
        await engine.load(into)
        assert stager.pool.leased == 0
        assert not fake.stream(fake.all_devices[0], "load").queue
    for name, target in into.items():
        assert torch.equal(target, state[name])
