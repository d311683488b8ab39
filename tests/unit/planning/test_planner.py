"""The direct plan equals what DCP's default planner plans, and paths equal DCP's."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_async._geometry import is_dense
from dcp_async.formats import Group, dcp_paths, tree_to_json
from dcp_async.formats.distcp import DistcpFormat
from dcp_async.formats.metadata_writer import MetadataTemplate
from dcp_async.planning.planner import CompiledPlan, PlanningOptions, compile_plan, draft_plan
from dcp_async.state import CaptureError
from dcp_async.state.capture import Captured, capture


class OwnPlanner(DefaultSavePlanner):
    """Goes through the protocol because it is another class."""


def _compile(state: dict[str, Any], planner: type[DefaultSavePlanner]) -> CompiledPlan:
    captured = capture(state, None)
    draft = draft_plan(captured, None, PlanningOptions(save=planner), is_coordinator=True)
    (answer,), shared = draft.merge([draft.message])
    mine = draft.assigned(answer)
    plan, locations = compile_plan(captured, draft.local_plan, mine, "0" * 16, shared)
    shared.locate(0, locations)
    return plan


def _template(plan: CompiledPlan) -> MetadataTemplate:
    assert plan.shared is not None
    return plan.shared.publication().metadata


def _decoded(plan: CompiledPlan) -> Metadata:
    metadata = pickle.loads(_template(plan).render("0123456789abcdef"))
    assert isinstance(metadata, Metadata)
    return metadata


def _state() -> dict[str, Any]:
    tied = torch.ones(3)
    return {
        "model": torch.nn.BatchNorm1d(4).state_dict(),
        "tied": {"a": tied, "b": tied},
        "param": torch.nn.Parameter(torch.ones(2, 3)),
        "list": [torch.zeros(2), {"x.y": 1, "e": {}}],
        "sparse": torch.eye(3).to_sparse(),
        "half": torch.ones(2, 3, dtype=torch.bfloat16).t(),
        "none": None,
    } | {"n": {1: "int key"}}


def test_direct_plan_equals_dcps() -> None:
    state = _state()
    ours, theirs = _decoded(_compile(state, DefaultSavePlanner)), _decoded(_compile(state, OwnPlanner))
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data == theirs.storage_data
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for name, entry in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(entry)
        if isinstance(entry, TensorStorageMetadata):
            assert isinstance(mine, TensorStorageMetadata)
            assert (mine.properties, mine.size, mine.chunks) == (entry.properties, entry.size, entry.chunks)
    assert {index: index.index for index in ours.storage_data} == {
        index: index.index for index in theirs.storage_data
    }


def test_tied_tensors_share_one_item() -> None:
    metadata = _decoded(_compile({"a": (t := torch.ones(3)), "b": t}, DefaultSavePlanner))
    first, second = metadata.storage_data.values()
    assert (first.offset, first.length) == (second.offset, second.length)


def test_uid_is_all_that_changes_between_renders() -> None:
    template = _template(_compile({"a": torch.ones(3), "n": 1}, DefaultSavePlanner))
    one, other = template.render("0" * 16), template.render("f" * 16)
    assert one.replace(b"0" * 16, b"f" * 16) == other
    assert len(template.pieces) == 3, "the names of the manifest and of the file are stored once"


NESTED = st.recursive(
    st.sampled_from([torch.zeros(1), 1, "x", None, (1, torch.ones(1))]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b", "0"]) | st.integers(0, 2), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["s", "t", "s.t"]), NESTED, max_size=3))
def test_names_and_paths_equal_dcps(state: dict[str, Any]) -> None:
    try:
        flat, paths = flatten_state_dict(state)
    except ValueError:  # DCP found a name twice
        with pytest.raises(CaptureError, match="two leaves"):
            capture(state, None)
        return
    captured = capture(state, None)
    assert set(captured.structure.names) == set(flat)
    assert dcp_paths(tree_to_json(captured.tree)) == paths


@given(st.permutations([0, 1, 2]), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_permuted_tensors_are_dense_and_others_are_not(order: list[int], shape: list[int]) -> None:
    tensor = torch.zeros(shape).permute(order)
    assert is_dense(tensor.shape, tensor.stride())
    sliced = torch.zeros([*shape, 2])[..., 0]
    assert is_dense(sliced.shape, sliced.stride()) == (sliced.numel() == 1)


def test_a_leaf_that_outgrew_its_room_asks_for_a_plan_not_for_another_structure() -> None:
    state = {"w": torch.ones(3), "text": "x"}
    first = capture(state, None)

    def compiled(captured: Captured, previous: CompiledPlan | None) -> CompiledPlan:
        draft = draft_plan(captured, previous, PlanningOptions(), is_coordinator=True)
        (answer,), shared = draft.merge([draft.message])
        mine = draft.assigned(answer)
        return compile_plan(captured, draft.local_plan, mine, "0" * 16, shared, previous=previous)[0]

    plan = compiled(first, None)
    state["text"] = "x" * 9000
    grown = capture(state, first.known)
    assert not grown.is_new
    assert not plan.has_room_for(grown)
    larger = compiled(grown, plan)
    assert larger.has_room_for(grown)
    state["text"] = "x"
    shrunk = capture(state, first.known)
    assert larger.has_room_for(shrunk)
    assert compiled(shrunk, larger).rooms == larger.rooms


class Wide(DistcpFormat):
    """Rooms of a page more; notes what it was told to index."""

    def __init__(self) -> None:
        self.indexed: list[str] = []

    def room(self, item_bytes: int) -> int:
        return super().room(item_bytes) + 4096

    def index(
        self,
        groups: Sequence[Group],
        paths: Mapping[str, Sequence[str | int]],
        *,
        planner_data: object = None,
    ) -> MetadataTemplate:
        self.indexed += paths
        return super().index(groups, paths, planner_data=planner_data)


def test_the_format_that_lays_a_file_out_indexes_it() -> None:
    captured, wide = capture({"w": torch.ones(3), "text": "x"}, None), Wide()
    draft = draft_plan(captured, None, PlanningOptions(), is_coordinator=True)
    (answer,), shared = draft.merge([draft.message])
    mine = draft.assigned(answer)
    plan, locations = compile_plan(captured, draft.local_plan, mine, "0" * 16, shared, format=wide)
    shared.locate(0, locations)
    assert plan.rooms == [8192]
    assert [len(item) for item in plan.padded(captured.leaf_items)] == [8192]
    shared.publication(plan.format)
    assert wide.indexed == ["w", "text"]
