"""Changes during an overlapped copy that a tensor's own version counter does not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import SGD, AdamW

from dcp_async import CheckpointEngine, StagingOptions, StateMutatedError
from dcp_async.staging import vectored_copy
from dcp_async.staging.watch.byte_sample import places_to_sample
from tests.support.doubles import KIB, MIB, FaultyStorage, assert_same
from tests.support.saves import HELD

ROWS = 1024  # 4 MiB of float32: more than the budget, so that staging waits for the gate
Change = Callable[[Any], Any]


async def changed_while_staged(
    faulty: FaultyStorage, state: dict[str, Any], change: Callable[[], Any]
) -> None:
    """Save ``state`` and call ``change`` in the middle of its staging."""
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            with torch.no_grad():
                change()
        try:
            await response.upload_completion
        except StateMutatedError:
            assert await engine.latest() is None
            raise


# --- wrappers -------------------------------------------------------------------------------------


def dtensor(mesh: DeviceMesh, placement: Any) -> DTensor:
    return DTensor.from_local(torch.zeros(ROWS, ROWS), mesh, [placement], run_check=False)


def _step(kind: Any, **options: Any) -> Change:
    """What the optimizer does to the tensor, without the hooks, which would wait for the copy."""

    def step(tensor: torch.Tensor) -> None:
        weight = torch.nn.Parameter(tensor)
        weight.grad = torch.ones_like(weight)
        optim = kind([weight], lr=0.1, **options)
        kind.step.__wrapped__(optim)

    return step


WRITES: dict[str, Change] = {
    "add_": lambda tensor: tensor.add_(1),
    "lerp_, as an average does": lambda tensor: tensor.lerp_(torch.ones_like(tensor), 0.1),
    "copy_": lambda tensor: tensor.copy_(torch.ones_like(tensor)),
    "foreach": lambda tensor: torch._foreach_add_([tensor], 1.0),
    "a view": lambda tensor: tensor[ROWS // 2 :].add_(1),
    "the local part": lambda tensor: tensor.to_local().add_(1),
    "a view of the local part": lambda tensor: tensor.to_local().view(-1).mul_(2).add_(1),
    "an optimizer that runs no hooks": _step(SGD, foreach=False),
    "a foreach optimizer that runs none": _step(AdamW, foreach=True),
}


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("write", WRITES)
async def test_a_change_of_a_dtensor_is_seen(
    faulty: FaultyStorage, mesh: DeviceMesh, write: str, placement: Any
) -> None:
    tensor = dtensor(mesh, placement)
    with pytest.raises(StateMutatedError, match="ema"):
        await changed_while_staged(faulty, {"ema": tensor}, lambda: WRITES[write](tensor))


async def test_a_dtensor_that_stays_is_saved(faulty: FaultyStorage, mesh: DeviceMesh) -> None:
    tensor = dtensor(mesh, Shard(0))
    await changed_while_staged(faulty, {"ema": tensor}, lambda: tensor.add(1))


class Rows(torch.Tensor):
    """Half of the rows of a larger tensor, by DCP's own hooks; operations count on the wrapper alone."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Rows:
        size = (2 * inner.shape[0], *inner.shape[1:])
        made: Rows = torch.Tensor._make_wrapper_subclass(cls, size, dtype=inner.dtype)
        made.held = inner
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        offsets = torch.Size([0] * self.held.dim())
        return [ChunkStorageMetadata(offsets=offsets, sizes=self.held.shape)]

    def __get_tensor_shard__(self, index: Any) -> torch.Tensor:
        return self.held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub says otherwise than it calls it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        target = args[0]
        func(*(arg.held if isinstance(arg, Rows) else arg for arg in args), **(kwargs or {}))
        return target


ROWS_WRITES: dict[str, Change] = {
    "the wrapper": lambda rows: rows.add_(1),
    "the wrapper twice": lambda rows: rows.mul_(0).add_(2),
    "the inner tensor": lambda rows: rows.held.add_(1),
}


@pytest.mark.parametrize("kind", ROWS_WRITES)
def test_a_wrapper_with_dcps_hooks_is_watched(kind: str) -> None:
    from dcp_async.staging.aside import watched
    from dcp_async.state.capture import capture

    rows = Rows(torch.zeros(ROWS, ROWS))
    captured = capture({"w": rows, "other": torch.zeros(ROWS, ROWS)}, None)
    captured, watch = watched(captured, [], {}, {})
    index = captured.structure.tensor_names.index("w")
    assert watch.wrappers_changed(range(2)) == set()
    with torch.no_grad():
        ROWS_WRITES[kind](rows)
    assert watch.wrappers_changed(range(2)) == {index}


# --- sharded modules ------------------------------------------------------------------------------


@pytest.fixture
def sharded(mesh: DeviceMesh) -> torch.nn.Linear:
    """FSDP2's, on one rank."""
    linear = torch.nn.Linear(ROWS, ROWS, bias=False)
    fully_shard(linear, mesh=mesh)
    return linear


SHARDED_WRITES: dict[str, Change] = {
    "add_": lambda weight: weight.add_(1),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "a foreach optimizer that runs no hooks": _step(AdamW, foreach=True),
    "a fused optimizer that runs no hooks": _step(AdamW, fused=True),
    "data": lambda weight: weight.data.add_(1),
}


@pytest.mark.parametrize("by_kernel", [True, False], ids=["the kernel samples", "the kernel refuses"])
@pytest.mark.parametrize("write", SHARDED_WRITES)
async def test_a_sharded_module_saved_without_its_optimizer_is_watched(
    faulty: FaultyStorage,
    sharded: torch.nn.Linear,
    write: str,
    by_kernel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not by_kernel:
        monkeypatch.setattr(vectored_copy, "_copy", None)
    with pytest.raises(StateMutatedError, match=r"\bweight\b"):
        await changed_while_staged(
            faulty, {"m": sharded}, lambda: SHARDED_WRITES[write](sharded.weight.detach())
        )


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
async def test_an_optimizer_of_dtensors_that_is_not_in_the_state_waits(
    root: Path, sharded: torch.nn.Linear, options: dict[str, Any]
) -> None:
    optim = AdamW(sharded.parameters(), lr=0.1, **options)
    for weight in sharded.parameters():
        weight.grad = torch.ones_like(weight)
    module: Any = sharded
    before = module.weight.to_local().clone()
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        response = await engine.save({"m": sharded})
        optim.step()
        await response.upload_completion
        assert torch.equal((await engine.read())["m"]["weight"], before)


# --- what moves no counter ------------------------------------------------------------------------


def _storage(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().copy_(torch.ones_like(tensor).untyped_storage())


UNSEEN: dict[str, Change] = {
    "data": lambda tensor: tensor.data.add_(1),
    "data is replaced": lambda tensor: setattr(tensor, "data", torch.ones_like(tensor)),
    "numpy": lambda tensor: tensor.numpy().fill(7),
    "a view in numpy": lambda tensor: tensor.numpy()[::2].fill(7),
    "dlpack": lambda tensor: torch.from_dlpack(tensor.__dlpack__()).add_(1),
    "storage": _storage,
    "storage is filled": lambda tensor: tensor.untyped_storage().fill_(1),
    "the state's own pointer": lambda tensor: torch.frombuffer(
        memoryview(tensor.numpy()), dtype=torch.float32
    ).add_(1),
}


@pytest.mark.parametrize("write", UNSEEN)
@pytest.mark.parametrize("count", [1, 3])
async def test_a_write_past_the_counter_is_seen(faulty: FaultyStorage, write: str, count: int) -> None:
    state = {f"w{number}": torch.zeros(ROWS, ROWS) for number in range(count)}
    last = state[f"w{count - 1}"]
    with pytest.raises(StateMutatedError, match=rf"\bw{count - 1}\b"):
        await changed_while_staged(faulty, state, lambda: UNSEEN[write](last))


async def test_a_fused_optimizer_that_runs_no_hooks_is_seen(faulty: FaultyStorage) -> None:
    weight = torch.nn.Parameter(torch.zeros(ROWS, ROWS))
    weight.grad = torch.ones_like(weight)
    optim = AdamW([weight], lr=0.1, fused=True)
    unhooked: Any = AdamW.step
    with pytest.raises(StateMutatedError, match=r"\bw\b"):
        await changed_while_staged(faulty, {"w": weight}, lambda: unhooked.__wrapped__(optim))


async def test_a_conjugate_view_elsewhere_in_the_state_hides_no_write(faulty: FaultyStorage) -> None:
    view = torch.zeros(ROWS, ROWS, dtype=torch.complex64).conj()
    state = {"view": view, "w": torch.zeros(ROWS, ROWS)}
    with pytest.raises(StateMutatedError, match=r"\bw\b"):
        await changed_while_staged(faulty, state, lambda: state["w"].data.add_(1))


async def test_a_write_to_an_inference_tensor_is_seen(faulty: FaultyStorage) -> None:
    with torch.inference_mode():
        tensor = torch.zeros(ROWS, ROWS)

    def write() -> None:
        with torch.inference_mode():
            tensor.add_(1)

    with pytest.raises(StateMutatedError, match=r"\bw\b"):
        await changed_while_staged(faulty, {"w": tensor}, write)


@pytest.mark.parametrize("write", UNSEEN)
async def test_a_write_past_the_counter_after_staging_is_welcome(
    root: Path, faulty: FaultyStorage, write: str
) -> None:
    tensor = torch.zeros(ROWS, ROWS)
    async with CheckpointEngine(faulty, staging=StagingOptions(overlap=True)) as engine:
        with faulty.hold("seal"):
            response = await engine.save({"x": tensor})
            await response.staging_completion
            UNSEEN[write](tensor)
        await response.upload_completion
        assert_same(await engine.read(), {"x": torch.zeros(ROWS, ROWS)})


async def test_the_columns_beside_a_view_may_change(root: Path, faulty: FaultyStorage) -> None:
    """Between the elements of a view lie somebody else's."""
    base = torch.zeros(ROWS, 2 * ROWS)
    view = base[:, ::2]
    await changed_while_staged(faulty, {"w": view}, lambda: base.numpy()[:, 1::2].fill(3))


async def test_small_tensors_may_be_written_past_the_counter_at_once(faulty: FaultyStorage) -> None:
    small = torch.zeros(1000)
    await changed_while_staged(
        faulty, {"small": small, "large": torch.zeros(ROWS, ROWS)}, lambda: small.data.add_(1)
    )


def test_the_sample_is_small_however_large_the_state_is() -> None:
    places = places_to_sample([4 * KIB] * 20_000, [True] * 20_000, range(2048))
    assert len({at for at, *_ in places}) == 64
    assert min(at for at, *_ in places) >= 2048
    assert max(at for at, *_ in places) > 18_000
    assert len(places) == 256


def test_the_sample_takes_the_largest_and_stays_inside() -> None:
    sizes = [1 + number % 97 for number in range(500)]
    sizes[123] = 64 * MIB
    places = places_to_sample(sizes, [number % 3 != 1 for number in range(500)], ())
    assert 123 in {at for at, *_ in places}
    assert all(at % 3 != 1 and offset >= 0 and offset + length <= sizes[at] for at, offset, length in places)
