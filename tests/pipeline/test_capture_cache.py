"""A state that kept its structure is not walked anew; what else changed must be in the next checkpoint."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import platform
import struct
from collections import OrderedDict
from collections.abc import Callable
from operator import is_
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, SaveError, StagingOptions, StateMutatedError
from dcp_async.staging.vectored_copy import RefusedError, VectoredCopy
from dcp_async.state.asking import Given
from dcp_async.state.capture import capture
from dcp_async.sync import CheckpointEngine as TwinEngine
from tests.support.doubles import (
    ASIDE_BYTES,
    KIB,
    MIB,
    PATIENCE,
    FaultyStorage,
    assert_same,
    frozen,
    random_tensor,
)
from tests.support.processes import run_in_process
from tests.support.saves import PART, SMALL


class Counting:
    """A Stateful that knows how often it was asked."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.asked = 0

    def state_dict(self) -> Any:
        self.asked += 1
        return self.inner

    def load_state_dict(self, state: Any) -> None:
        self.inner = state


def make_state() -> dict[str, Any]:
    return {
        "m": OrderedDict(
            w=random_tensor(torch.float32, (40, 30), 1),
            v=random_tensor(torch.float32, (40, 30), 2),
            b=random_tensor(torch.float32, (1,), 3),
            c=random_tensor(torch.complex64, (1,), 4),
            e=torch.zeros(0, 3),
            large=random_tensor(torch.float32, (100, 300), 5),
        ),
        "l": [random_tensor(torch.int16, (7,), 6), {"x": 1, "y": [1, 2], "t": (1, 2)}, []],
        "d": {1: random_tensor(torch.uint8, (5,), 7), "empty": {}},
        "n": 3,
        "s": "text",
        "sparse": torch.eye(3).to_sparse(),
    }


def _written(state: Any) -> None:
    state["m"]["w"].numpy()[...] = 5  # moves no version counter


def _swapped(state: Any) -> None:
    state["m"]["w"].data = random_tensor(torch.float32, (40, 30), 9)


def _exchanged(state: Any) -> None:
    inner = state["m"]
    inner["w"].data, inner["v"].data = inner["v"].data, inner["w"].data


def _reshaped(state: Any) -> None:
    state["m"]["w"].data = random_tensor(torch.float32, (30, 40), 9)


def _retyped(state: Any) -> None:
    state["m"]["w"].data = random_tensor(torch.int32, (40, 30), 9)


def _transposed(state: Any) -> None:
    state["m"]["w"].t_()


def _restrided(state: Any) -> None:
    storage = random_tensor(torch.float32, (40, 60), 9).untyped_storage()
    state["m"]["w"].set_(storage, 0, (40, 30), (60, 2))


def _moved_within_its_storage(state: Any) -> None:
    state["m"]["w"] = state["m"]["large"].view(-1)[100:1300].view(40, 30)


def _unsqueezed(state: Any) -> None:
    state["m"]["w"].unsqueeze_(0)


def _resized(state: Any) -> None:
    state["m"]["w"].resize_(20, 30)


def _grown(state: Any) -> None:
    state["m"]["w"].untyped_storage().resize_(1 << 20)


def _tied(state: Any) -> None:
    state["m"]["v"].data = state["m"]["w"].data


def _tied_object(state: Any) -> None:
    state["m"]["v"] = state["m"]["w"]


def _negated(state: Any) -> None:
    state["m"]["b"] = torch._neg_view(state["m"]["b"])


def _conjugated(state: Any) -> None:
    state["m"]["c"] = state["m"]["c"].conj()


def _made_sparse(state: Any) -> None:
    state["m"]["w"] = state["m"]["w"].to_sparse()


def _made_dense(state: Any) -> None:
    state["sparse"] = torch.eye(3)


def _quantised(state: Any) -> None:
    state["m"]["w"] = torch.quantize_per_tensor(torch.ones(40, 30), 0.1, 3, torch.qint8)


def _reordered(state: Any) -> None:
    state["m"].move_to_end("w")


def _key_of_another_type(state: Any) -> None:
    state["d"] = {True: state["d"][1], "empty": {}}


def _leaf_of_another_type(state: Any) -> None:
    state["n"] = 3.0


def _leaf_value(state: Any) -> None:
    state["n"], state["l"][1]["x"] = 4, 2


def _leaf_outgrows_its_slot(state: Any) -> None:
    state["s"] = "x" * 9000


def _list_of_leaves_gets_a_tensor(state: Any) -> None:
    state["l"][1]["y"] = [torch.ones(2), 2]


def _list_entry_becomes_a_tensor(state: Any) -> None:
    state["l"][1]["y"][0] = torch.ones(2)


def _empty_list_gets_a_mapping(state: Any) -> None:
    state["l"][2].append({"a": 1})


def _empty_mapping_gets_a_tensor(state: Any) -> None:
    state["d"]["empty"]["a"] = torch.ones(3)


def _container_becomes_leaf(state: Any) -> None:
    state["d"] = (1, 2)


def _removed(state: Any) -> None:
    del state["m"]["w"]


def _parameter(state: Any) -> None:
    state["m"]["w"] = torch.nn.Parameter(state["m"]["w"])


def _inference(state: Any) -> None:
    with torch.inference_mode():
        state["m"]["w"] = torch.ones(40, 30)


CHANGES: list[Callable[[Any], None]] = [
    *(
        _written,
        _swapped,
        _exchanged,
        _reshaped,
        _retyped,
        _transposed,
        _restrided,
        _moved_within_its_storage,
    ),
    *(_unsqueezed, _resized, _grown, _tied, _tied_object, _negated, _conjugated, _made_sparse, _made_dense),
    *(_quantised, _reordered, _key_of_another_type, _leaf_of_another_type, _leaf_value),
    *(_leaf_outgrows_its_slot, _list_of_leaves_gets_a_tensor, _list_entry_becomes_a_tensor),
    *(_empty_list_gets_a_mapping, _empty_mapping_gets_a_tensor, _container_becomes_leaf, _removed),
    *(_parameter, _inference),
]


@pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*[Tt]ypedStorage.*:UserWarning")
@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_in_place_is_in_the_next_checkpoint(
    root: Path, change: Callable[[Any], None], overlap: bool
) -> None:
    budget = 4 * PART + (ASIDE_BYTES if overlap else 0)
    options = StagingOptions(part_bytes=PART, budget_bytes=budget, overlap=overlap)
    state, inner = make_state(), make_state()
    stateful = Counting(inner)
    both = {"plain": state, "asked": stateful}
    async with CheckpointEngine(root, staging=options) as engine:
        for step in range(4):
            if step == 2:
                change(state)
                change(inner)
            expected = frozen(state)
            await (await engine.save(both, step=step)).upload_completion
            found = await engine.read(step)
            assert_same(found["plain"], expected)
            assert_same(found["asked"], expected)
    assert stateful.asked == 4


def tied_objects() -> dict[str, Any]:
    tensor, other = torch.ones(3), torch.ones(3)
    return {"a": tensor, "b": {"a": tensor, "c": [other, tensor[:2]]}, "d": torch.nn.Parameter(tensor)}


def only_leaves() -> dict[str, Any]:
    return {"a": 1, "b": []}


@pytest.mark.parametrize("make", [make_state, tied_objects, only_leaves])
def test_a_state_that_did_not_change_is_not_walked_again(make: Callable[[], dict[str, Any]]) -> None:
    state = {"plain": make(), "asked": Counting(make())}
    first = capture(state, None)
    given: Given = {}
    repeat = first.known.cache.look_up(state, given)
    assert repeat is not None
    assert all(map(is_, repeat.tensors, first.tensors))
    assert first.known.cache.look_up(state, given) is not None
    again = capture(state, first.known)
    assert (again.structure is first.structure, again.is_new) == (True, False)
    assert (again.leaf_items, again.live) == (first.leaf_items, first.live)
    assert all(map(is_, again.tensors, first.tensors))
    assert again.pointers == first.pointers


async def test_ties_stay_and_open(root: Path) -> None:
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(first, second)
    second.weight = first.weight
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step in range(5):
            if step == 3:
                second.weight = torch.nn.Parameter(torch.randn(8, 8))
            expected = frozen(model.state_dict())
            await (await engine.save({"m": model}, step=step)).upload_completion
            assert_same((await engine.read(step))["m"], expected)
            with torch.no_grad():
                first.weight.add_(1)


async def test_a_stateful_that_changes_what_lies_beside_it_is_not_torn(root: Path) -> None:
    class Dealer(Counting):
        def state_dict(self) -> Any:
            beside["count"] = [self.asked, torch.full((3,), float(self.asked))]
            return super().state_dict()

    beside: dict[str, Any] = {"count": [0, torch.zeros(3)]}
    state = {"dealer": Dealer({"x": torch.ones(2)}), "beside": beside}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step in range(4):
            await (await engine.save(state, step=step)).upload_completion
            assert_same((await engine.read(step))["beside"], beside)
            assert beside["count"][0] == step


async def test_statefuls_are_asked_in_the_order_of_the_walk(root: Path) -> None:
    order: list[str] = []

    class Told(Counting):
        def __init__(self, name: str, inner: Any) -> None:
            super().__init__(inner)
            self.name = name

        def state_dict(self) -> Any:
            order.append(self.name)
            return super().state_dict()

    deep = Told("b", {"t": torch.ones(1)})
    state = {
        "x": {"y": [Told("a", {"inner": deep, "t": torch.ones(2)}), {"z": Told("c", {"n": 1})}]},
        "last": Told("d", {"t": torch.ones(3)}),
    }
    async with CheckpointEngine(root, staging=SMALL) as engine:
        for step in range(3):
            order.clear()
            await (await engine.save(state, step=step)).upload_completion
            assert order == ["a", "b", "c", "d"]


async def test_memory_that_was_swapped_during_staging_fails_the_save(
    root: Path, faulty: FaultyStorage
) -> None:
    options = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 8 * PART, overlap=True)
    state = {f"w{index:04d}": torch.ones(16 * KIB // 4) for index in range(2 * ASIDE_BYTES // (16 * KIB))}
    async with CheckpointEngine(faulty, staging=options) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            list(state.values())[-1].data = torch.zeros(16 * KIB // 4)
        with pytest.raises(StateMutatedError, match="w1023"):
            await response.upload_completion
        with pytest.raises(SaveError):
            await response.staging_completion


@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda tensor: tensor.conj().imag])
async def test_memory_that_was_swapped_beside_a_lazy_view_fails_the_save(
    root: Path, faulty: FaultyStorage, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """No address is handed to the kernel then; what was swapped is found all the same."""
    options = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 8 * PART, overlap=True)
    state = {f"w{index:04d}": torch.ones(16 * KIB // 4) for index in range(2 * ASIDE_BYTES // (16 * KIB))}
    state["lazy"] = view(torch.ones(4, dtype=torch.complex64))
    async with CheckpointEngine(faulty, staging=options) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            state["w1023"].data = torch.zeros(16 * KIB // 4)
        with pytest.raises(StateMutatedError, match="w1023"):
            await response.upload_completion
        with pytest.raises(SaveError):
            await response.staging_completion


def test_gather_refuses_memory_that_is_not_there() -> None:
    buffer = torch.zeros(4 * MIB, dtype=torch.uint8)
    gather = VectoredCopy([buffer.data_ptr()], [4096], [0])
    gather.read_from([4096])  # below what a process may map
    with pytest.raises(RefusedError, match="Bad address"):
        gather.copy(0, gather.num_calls)


def test_gather_leaves_what_lies_between_alone() -> None:
    sources = [random_tensor(torch.uint8, (1 + index % 50,), index) for index in range(2000)]
    buffer = random_tensor(torch.uint8, (300_000,), 1)
    expected = buffer.clone()
    targets, at = [], 100
    for source in sources:
        targets.append(buffer.data_ptr() + at)
        expected[at : at + len(source)] = source
        at += len(source) + 37
    gather = VectoredCopy(targets, [len(source) for source in sources], [0, 5, 6, 1000])
    gather.read_from([source.data_ptr() for source in sources])
    gather.copy(0, gather.num_calls)
    assert torch.equal(buffer, expected)


def _save_where_the_kernel_forbids_it(root: Path) -> list[str]:
    """What is logged meanwhile."""
    number = {"x86_64": 311, "aarch64": 271}[platform.machine()]  # of process_vm_readv
    refuse, allow = (6, 0, 0, 0x50000 | errno.EPERM), (6, 0, 0, 0x7FFF0000)
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), refuse, allow]
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
    said = io.StringIO()
    logging.basicConfig(level=logging.INFO, stream=said)
    state = {f"w{index}": torch.randn(index) for index in range(300)}
    with TwinEngine(root) as engine:
        for step in range(3):
            engine.save(state, step=step).upload_completion.result(PATIENCE)
        found = engine.read()
    assert all(torch.equal(found[name], state[name]) for name in state)
    return said.getvalue().splitlines()


@pytest.mark.usefixtures("process_server")
def test_where_the_kernel_forbids_it_tensors_are_copied_one_by_one(tmp_path: Path) -> None:
    """As under the seccomp filters of older container runtimes."""
    said = run_in_process(_save_where_the_kernel_forbids_it, tmp_path)
    assert sum("small tensors are copied one by one" in line for line in said) == 1
