"""States of DTensors are captured again as plain ones are; what a guard does not compare is noticed."""

from __future__ import annotations

import dataclasses
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_async.state.capture import Captured, capture


@pytest.fixture(params=[(1, 0), (2, 0), (2, 1)], ids=["alone", "first of two", "second of two"])
def mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """Of a group that does not communicate."""
    world_size, rank = request.param
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def dtensor(
    mesh: DeviceMesh, rows: int = 4, placement: Any = None, whole: tuple[int, int] | None = None
) -> DTensor:
    """One whose local part has so many ``rows`` of 4."""
    shape, strides = (torch.Size(whole), (4, 1)) if whole is not None else (None, None)
    return DTensor.from_local(
        torch.zeros(rows, 4), mesh, [placement or Shard(0)], run_check=False, shape=shape, stride=strides
    )


def state_of(tensor: object, mesh: DeviceMesh) -> dict[str, Any]:
    return {
        "plain": torch.ones(3),
        "deep": {"w": tensor, "list": [dtensor(mesh), 3, dtensor(mesh, 8)]},
        "last": torch.ones(2),
    }


def assert_equal(captured: Captured, expected: Captured) -> None:
    for field in dataclasses.fields(expected.structure):
        assert getattr(captured.structure, field.name) == getattr(expected.structure, field.name), field.name
    assert [id(tensor) for tensor in captured.tensors] == [id(tensor) for tensor in expected.tensors]
    assert captured.pointers == expected.pointers
    assert captured.leaf_items == expected.leaf_items
    assert {name: id(value) for name, value in captured.live.items()} == {
        name: id(value) for name, value in expected.live.items()
    }


def never(*args: Any, **options: Any) -> Any:
    raise AssertionError("the state was flattened anew")


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_a_state_of_dtensors_is_not_flattened_again(
    mesh: DeviceMesh, placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = dtensor(mesh, placement=placement)
    # as a state_dict() does, which makes each of them anew
    state, again = (state_of(tensor.detach(), mesh) for _ in range(2))
    first = capture(state, None)
    expected = capture(again, None)
    monkeypatch.setattr(sys.modules[capture.__module__], "flatten", never)
    assert_equal(capture(again, first.known), expected)
    assert_equal(capture(state, first.known), capture(state, first.known))


def test_a_part_that_is_empty_on_this_rank_hinders_nothing(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(dtensor(mesh, 0, whole=(1, 4)), mesh)
    state["deep"]["none at all"] = dtensor(mesh, 0, whole=(0, 4))
    first = capture(state, None)
    assert [name for name, *_ in first.structure.bare] == ["deep.w"]
    assert "deep.none at all" in first.structure.tensor_names
    monkeypatch.setattr(sys.modules[capture.__module__], "flatten", never)
    assert_equal(capture(state, first.known), first)


def test_an_empty_part_that_is_filled_is_noticed(mesh: DeviceMesh) -> None:
    known = capture(state_of(dtensor(mesh, 0, whole=(1, 4)), mesh), None).known
    filled = state_of(dtensor(mesh, 1, whole=(1, 4)), mesh)
    assert_equal(capture(filled, known), capture(filled, None))


def _with_spec(tensor: DTensor, mesh: DeviceMesh) -> DTensor:
    tensor._spec = dtensor(mesh, placement=Shard(1))._spec
    return tensor


def _with_placements(tensor: DTensor, mesh: DeviceMesh) -> DTensor:
    tensor._spec.placements = (Shard(1),)
    return tensor


def _with_local(tensor: DTensor, mesh: DeviceMesh) -> DTensor:
    tensor._local_tensor = torch.zeros(4, 4).t()[::1]
    return tensor


CHANGES: dict[str, Callable[[DTensor, DeviceMesh], object]] = {
    "redistributed": lambda tensor, mesh: tensor.redistribute(mesh, [Replicate()]),
    "another placement": lambda tensor, mesh: dtensor(mesh, placement=Shard(1)),
    "replicated": lambda tensor, mesh: dtensor(mesh, placement=Replicate()),
    "a new mesh": lambda tensor, mesh: dtensor(init_device_mesh("cpu", tuple(mesh.shape))),
    "a mesh with a name": lambda tensor, mesh: dtensor(
        init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=("dp",))
    ),
    "resized": lambda tensor, mesh: dtensor(mesh, 6),
    "uneven, with the same rows here": lambda tensor, mesh: dtensor(mesh, whole=(4 * mesh.size() - 1, 4)),
    "another dtype": lambda tensor, mesh: tensor.double(),
    "with grad": lambda tensor, mesh: tensor.detach().requires_grad_(),
    "plain": lambda tensor, mesh: tensor.to_local(),
    "its spec is another": _with_spec,
    "its spec was changed in place": _with_placements,
    "its local part has other strides": _with_local,
    "a parameter": lambda tensor, mesh: torch.nn.Parameter(tensor),
    "None": lambda tensor, mesh: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_about_a_dtensor_is_noticed(mesh: DeviceMesh, change: str) -> None:
    tensor = dtensor(mesh)
    state = state_of(tensor, mesh)
    known = capture(state, None).known
    state["deep"]["w"] = CHANGES[change](tensor, mesh)
    captured = capture(state, known)
    assert_equal(captured, capture(state, None))
    # and what was noticed is known from then on
    assert_equal(capture(state, captured.known), captured)


def test_one_that_stands_twice_in_a_state_is_captured_as_before(mesh: DeviceMesh) -> None:
    state = state_of(tensor := dtensor(mesh), mesh)
    state["tied"] = tensor
    first = capture(state, None)
    assert first.structure.ties
    assert_equal(capture(state, first.known), first)


def test_dtensors_of_one_memory_stay_tied(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    state = state_of(tensor := dtensor(mesh), mesh)
    state["tied"] = tensor.detach()
    first = capture(state, None)
    assert first.structure.ties
    apart = state | {"tied": dtensor(mesh)}
    assert_equal(capture(apart, first.known), capture(apart, None))
    monkeypatch.setattr(sys.modules[capture.__module__], "flatten", never)
    assert_equal(capture(state, first.known), first)


def test_no_dtensor_is_kept(mesh: DeviceMesh) -> None:
    tensor = dtensor(mesh)
    reference, local = weakref.ref(tensor), weakref.ref(tensor._local_tensor)
    captured = capture({"w": tensor}, None)
    known = captured.known
    captured.release()
    del captured, tensor
    gc.collect()
    assert known is not None
    assert reference() is None
    assert local() is None
