"""Who writes what, over ranks: each piece once, by bytes; conflicts named; `.metadata` as stock's planner has
it."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dcp_async._names import data_file
from dcp_async.formats import tree_to_json
from dcp_async.formats.metadata_reader import decode_metadata
from dcp_async.planning.all_plans import AllPlans
from dcp_async.planning.assignment import Assignment, assign
from dcp_async.planning.conflicts import ConflictError, check_leaves
from dcp_async.planning.global_plan import GlobalPlan, ItemLocations, Publication
from dcp_async.planning.local_plan import LocalPlan, make_local_plan, unpack_leaves, unpack_tensors
from dcp_async.planning.planner import CompiledPlan, compile_plan
from dcp_async.state.capture import Captured, capture
from dcp_async.state.stateful import PerRank
from dcp_async.trust.plain_data import dumps, loads
from tests.support.pieces import Box, Pieces

UID = "0123456789abcdef"


State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan of all ranks, its messages having travelled."""

    captured: list[Captured]
    all_plans: list[LocalPlan]
    assignments: list[Assignment]
    plans: list[CompiledPlan]
    publication: Publication

    @property
    def metadata(self) -> Metadata:
        """What is published, as it is read back."""
        return decode_metadata(self.publication.metadata.render(UID))

    def written(self) -> list[tuple[int, str, tuple[int, ...] | None]]:
        """(rank, name, offsets) of everything that is written."""
        found: list[tuple[int, str, tuple[int, ...] | None]] = []
        for rank, (captured, mine) in enumerate(zip(self.captured, self.assignments, strict=True)):
            structure = captured.structure
            for index in mine["tensors"]:
                shard = structure.shards.get(index)
                offsets = shard.offsets if shard else (0,) * len(structure.shapes[index])
                found.append((rank, structure.tensor_names[index], offsets))
            found += [(rank, structure.leaf_names[index], None) for index in mine["leaves"]]
        return found

    def num_bytes(self) -> list[int]:
        """Of tensors, per rank."""
        return [
            sum(captured.tensors[index].nbytes for index in mine["tensors"])
            for captured, mine in zip(self.captured, self.assignments, strict=True)
        ]


def travelled(message: Any) -> Any:
    return loads(dumps(message))


def local_plans_of(states: Sequence[State]) -> list[LocalPlan]:
    return [
        travelled(make_local_plan(capture(state, None, rank=rank), None)) for rank, state in enumerate(states)
    ]


def plan(states: Sequence[State]) -> Planned:
    """As the ranks and their coordinator do it."""
    captured = [capture(state, None, rank=rank) for rank, state in enumerate(states)]
    drafts = [make_local_plan(each, None) for each in captured]
    all_plans = AllPlans([travelled(draft) for draft in drafts])
    assignments: list[Assignment] = [travelled(answer) for answer in assign(all_plans)]
    shared = GlobalPlan(all_plans)
    plans = []
    for rank, (each, draft, mine) in enumerate(zip(captured, drafts, assignments, strict=True)):
        compiled, locations = compile_plan(each, draft, mine, UID, shared if rank == 0 else None)
        shared.locate(rank, travelled(locations))
        plans.append(compiled)
    return Planned(captured, drafts, assignments, plans, shared.publication())


def stock(states: Sequence[State]) -> Metadata:
    """What stock's planner makes of the same."""
    plans = []
    for rank, state in enumerate(states):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, None, is_coordinator=rank == 0)
        plans.append(pickle.loads(pickle.dumps(planner.create_local_plan())))
    coordinator = DefaultSavePlanner()
    coordinator.set_up_planner(states[0], None, is_coordinator=True)
    metadata = coordinator.create_global_plan(plans)[1]
    assert isinstance(metadata, Metadata)
    return metadata


def assert_equals_stock(planned: Planned, states: Sequence[State]) -> None:
    ours, theirs = planned.metadata, stock(states)
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    assert ours.planner_data == theirs.planner_data
    for name, entry in theirs.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(entry), name
        if isinstance(mine, TensorStorageMetadata) and isinstance(entry, TensorStorageMetadata):
            # stock has the strides of whatever piece it saw last there, and never reads them
            entry.properties.__dict__.pop("strides", None)
            assert (mine.properties, mine.size) == (entry.properties, entry.size)
            # the order among ranks that hold the same is the planner's own business
            assert chunks_of(mine) == chunks_of(entry)


def chunks_of(entry: TensorStorageMetadata) -> list[Box]:
    return sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)


def assert_written_once(planned: Planned) -> None:
    """Each item of `.metadata` is written by one rank, and lies where that rank's layout has it; ties aside,
    which share."""
    metadata = planned.metadata
    assert metadata.storage_data is not None
    written = planned.written()
    keys = [(name, offsets) for _, name, offsets in written]
    assert len(set(keys)) == len(keys)
    tied = {name for captured in planned.captured for name, _ in captured.structure.ties}
    exotic = {name for name, entry in metadata.state_dict_metadata.items() if (name, None) in keys}
    stored = {
        (index.fqn, None if index.fqn in exotic or index.offset is None else tuple(index.offset)): info
        for index, info in metadata.storage_data.items()
        if index.fqn not in tied or index.fqn in {name for name, _ in keys}
    }
    assert stored.keys() == set(keys)
    for rank, mine in enumerate(planned.plans):
        layout = mine.layout
        mine_keys = [(name, offsets) for writer, name, offsets in written if writer == rank]
        for key, offset, length in zip(mine_keys, layout.item_offsets, layout.item_bytes, strict=True):
            info = stored[key]
            assert info.relative_path == data_file(rank, 0, UID)
            assert (info.offset, info.length) == (offset, length)


# Partitions.

SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


@st.composite
def partitions(draw: st.DrawFn) -> list[State]:
    """The states of one to four ranks that share some tensors, each in a way of its own: whole on several
    ranks, or cut into rows that lie on one rank or on several; and leaves, of which some are common."""
    world = draw(st.integers(1, 4))
    states: list[State] = [{"m": {}, "o": {}} for _ in range(world)]
    some_ranks = st.sets(st.integers(0, world - 1), min_size=1)
    for number in range(draw(st.integers(0, 5))):
        shape = draw(SHAPES)
        whole = torch.arange(math.prod(shape), dtype=draw(st.sampled_from([torch.float32, torch.int16])))
        whole = whole.reshape(shape)
        name = f"t{number}"
        if draw(st.booleans()):
            for rank in draw(some_ranks):
                states[rank]["m"][name] = whole.clone()
            continue
        cuts = sorted(draw(st.sets(st.integers(1, shape[0]), max_size=shape[0])) - {shape[0]})
        rows = list(zip([0, *cuts], [*cuts, shape[0]], strict=True))
        held: list[list[Box]] = [[] for _ in range(world)]
        for low, high in rows:
            for rank in draw(some_ranks):
                held[rank].append(((low, *(0,) * (len(shape) - 1)), (high - low, *shape[1:])))
        for rank, boxes in enumerate(held):  # ranks without a piece know of the tensor all the same
            states[rank]["m"][name] = Pieces.of(whole, boxes)
    for number in range(draw(st.integers(0, 3))):
        for rank in draw(some_ranks):
            states[rank]["o"][f"leaf{number}"] = number
    return states


@given(partitions())
def test_every_piece_is_written_once_whatever_the_partition(states: list[State]) -> None:
    planned = plan(states)
    assert_written_once(planned)
    assert_equals_stock(planned, states)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=12), st.integers(2, 5))
def test_replicated_tensors_are_spread_by_bytes(sizes: list[int], world: int) -> None:
    states: list[State] = [
        {"m": {str(at): torch.zeros(n) for at, n in enumerate(sizes)}} for _ in range(world)
    ]
    planned = plan(states)
    assert_written_once(planned)
    loads = planned.num_bytes()
    # the heaviest goes first, to whoever has least: none is further ahead than one tensor
    assert max(loads) - min(loads) <= 4 * max(sizes)


def test_what_only_one_rank_holds_counts_when_the_rest_is_spread() -> None:
    common = {str(at): torch.zeros(10) for at in range(10)}
    states: list[State] = [{"m": common | {"own": torch.zeros(100)}}, {"m": dict(common)}]
    assert plan(states).num_bytes() == [400, 400]


def test_disjoint_keys_stay_where_they_are() -> None:
    states: list[State] = [{f"stage{rank}": {"w": torch.ones(rank + 1), "n": rank}} for rank in range(3)]
    planned = plan(states)
    assert [(rank, name) for rank, name, _ in planned.written()] == [
        (rank, f"stage{rank}.{key}") for rank in range(3) for key in ("w", "n")
    ]
    assert all(not mine["groups"] for mine in planned.assignments)
    assert_equals_stock(planned, states)


def test_ranks_that_offer_equal_bytes_do_so_whatever_their_place() -> None:
    """What makes planning cost next to nothing per rank."""
    whole = torch.zeros(8, 2)
    states = [{"m": {"w": Pieces.of(whole, [((2 * rank, 0), (2, 2))])}, "n": 1} for rank in range(4)]
    all_plans = local_plans_of(states)
    part: Literal["tensors", "leaves", "tree", "hashes"]
    for part in ("tensors", "leaves", "tree", "hashes"):
        assert len({local_plan[part] for local_plan in all_plans}) == 1


def test_bare_tensor_is_known_but_not_written() -> None:
    whole = torch.zeros(4, 2)
    states: list[State] = [{"w": Pieces.of(whole, [((0, 0), (4, 2))])}, {"w": Pieces.of(whole, [])}]
    planned = plan(states)
    assert planned.written() == [(0, "w", (0, 0))]
    assert [mine["tensors"] for mine in planned.assignments] == [[0], []]
    assert_equals_stock(planned, states)


def test_tensor_that_no_rank_holds_is_a_conflict() -> None:
    states = [{"w": Pieces.of(torch.zeros(4, 2), [])} for _ in range(2)]
    with pytest.raises(ConflictError, match="w: the ranks hold 0 of its 8 elements"):
        AllPlans(local_plans_of(states))


def test_ties_are_stored_once_and_found_under_both_names() -> None:
    def tied() -> State:
        tensor = torch.ones(3)
        return {"a": tensor, "b": tensor}

    planned = plan([tied(), tied()])
    assert [name for _, name, _ in planned.written()] == ["a"]
    stored = planned.metadata.storage_data
    assert stored is not None
    zero = torch.Size([0])
    assert stored[MetadataIndex("a", zero)] == stored[MetadataIndex("b", zero)]


def test_tensor_that_is_tied_on_one_rank_only_is_found() -> None:
    tensor = torch.ones(3)
    planned = plan([{"a": tensor, "b": tensor}, {"a": torch.ones(3), "b": torch.ones(3)}])
    assert sorted(name for _, name, _ in planned.written()) == ["a", "b"]
    assert planned.metadata.state_dict_metadata.keys() == {"a", "b"}


def test_exotic_tensor_is_written_by_the_lowest_rank() -> None:
    states: list[State] = [{"s": torch.eye(3).to_sparse(), "n": 1} for _ in range(2)]
    planned = plan(states)
    assert [(rank, name) for rank, name, _ in planned.written()] == [(0, "s"), (0, "n")]
    assert '"exotic":["s"]' in planned.publication.manifest_json
    assert_equals_stock(planned, states)


def test_strides_of_whole_tensors_are_published() -> None:
    planned = plan([{"t": torch.ones(2, 3).t()}] * 2)
    assert '"strides":{"t":[1,3]}' in planned.publication.manifest_json


# Leaves.


def test_leaves_are_grouped_by_who_holds_them() -> None:
    states: list[State] = [{"all": 1, "some": 2, "own": 3}, {"all": 1, "some": 2}, {"all": 1}]
    planned = plan(states)
    names = [
        [[captured.structure.leaf_names[index] for index in leaves] for _, leaves in mine["groups"]]
        for captured, mine in zip(planned.captured, planned.assignments, strict=True)
    ]
    assert names == [[["all"], ["some"]], [["all"], ["some"]], [["all"]]]
    groups = [[group for group, _ in mine["groups"]] for mine in planned.assignments]
    assert groups == [[0, 1], [0, 1], [0]]
    assert [mine["leaves"] for mine in planned.assignments] == [[0, 1, 2], [], []]


@given(st.lists(st.integers(0, 2), min_size=2, max_size=5))
def test_leaf_that_differs_is_named_with_the_first_two_ranks(values: list[int]) -> None:
    all_plans = local_plans_of([{"o": {"same": 7, "x": value}} for value in values])
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is None:
        AllPlans(all_plans)
        return
    with pytest.raises(ConflictError, match=rf"o\.x differs between rank 0 and rank {other}\. .*PerRank"):
        AllPlans(all_plans)


def test_leaf_per_rank_may_differ() -> None:
    planned = plan([{"loader": PerRank(rank), "n": 1} for rank in range(3)])
    written = [(rank, name) for rank, name, _ in planned.written()]
    assert written == [(0, "loader.rank_0"), (0, "n"), (1, "loader.rank_1"), (2, "loader.rank_2")]


def test_hashes_are_compared_by_name() -> None:
    hashes: list[Mapping[str, int]] = [{"a": 1}, {"b": 2}, {"a": 1, "b": 3}]
    with pytest.raises(ConflictError, match="b differs between rank 1 and rank 2"):
        check_leaves(enumerate(hashes))


# Conflicts.


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (torch.ones(2), torch.ones(3), r"w is \(2,\) float32 on rank 0, but \(3,\) float32 on rank 2"),
        (torch.ones(2), torch.ones(2).half(), r"w is \(2,\) float32 on rank 0, but \(2,\) float16 on rank 2"),
        (torch.ones(2), 1, "w is a tensor on rank 0 and something else on rank 2"),
        (1, torch.ones(2), "w is a tensor on rank 2 and something else on rank 0"),
        (torch.eye(2), torch.eye(2).to_sparse(), "w is a tensor on rank 0 and something else on rank 2"),
    ],
    ids=["size", "dtype", "leaf", "leaf first", "sparse"],
)
def test_conflict_names_tensor_and_ranks(one: Any, other: Any, message: str) -> None:
    with pytest.raises(ConflictError, match=message):
        AllPlans(local_plans_of([{"w": one}, {"w": one}, {"w": other}]))


@pytest.mark.parametrize(
    ("boxes", "covered"),
    [
        ([((0, 0), (2, 2)), ((3, 0), (1, 2))], 6),
        ([((0, 0), (3, 2)), ((2, 0), (2, 2))], 10),
        ([((0, 0), (4, 2)), ((0, 0), (2, 2))], 12),
    ],
    ids=["hole", "overlap", "two sizes at one place"],
)
def test_pieces_that_do_not_make_up_the_tensor_are_a_conflict(boxes: list[Box], covered: int) -> None:
    whole = torch.zeros(4, 2)
    all_plans = local_plans_of([{"w": Pieces.of(whole, [box])} for box in boxes])
    with pytest.raises(ConflictError, match=f"w: the ranks hold {covered} of its 8 elements"):
        AllPlans(all_plans)


def test_item_without_a_place_is_named() -> None:
    all_plans = AllPlans(local_plans_of([{"a": torch.ones(1), "n": 1}]))
    shared = GlobalPlan(all_plans)
    placed = ItemLocations(
        tensors=b"",
        leaves=array("I", [0]).tobytes(),
        offsets=array("Q", [0]).tobytes(),
        lengths=array("Q", [512]).tobytes(),
        own_start=0,
        runs={"whole": b"", "heads": []},
    )
    shared.locate(0, placed)
    with pytest.raises(ConflictError, match=r"a: the planner made no rank write it at \(0,\)"):
        shared.publication()


# What is published.


def test_published_bytes_equal_a_pickle_of_the_same_metadata() -> None:
    """`.metadata` is written opcode by opcode; reading it gives what pickling the objects would."""
    whole = torch.zeros(4, 2)
    planned = plan(
        [
            {"w": Pieces.of(whole, [((2 * rank, 0), (2, 2))]), "n": 1, "own": PerRank(rank)}
            for rank in range(2)
        ]
    )
    raw = planned.publication.metadata.render(UID)
    for load in (pickle.loads, decode_metadata, lambda each: pickle._loads(each)):  # type: ignore[attr-defined]  # the slow, strict one
        found = load(raw)
        again = pickle.loads(pickle.dumps(found))
        assert vars(again) == vars(found)
        assert {index: vars(index) for index in again.storage_data} == {
            index: vars(index) for index in found.storage_data
        }
        assert [vars(info) for info in found.storage_data.values()] == [
            vars(info) for info in again.storage_data.values()
        ]
    entry = planned.metadata.state_dict_metadata["n"]
    assert isinstance(entry, BytesStorageMetadata)
    assert len(planned.publication.metadata.pieces) == 4, "each of the three files is named once"


def test_trees_of_ranks_that_hold_different_parts_are_published_as_one() -> None:
    deep = {"b": {"c": {"d": {"e": 1}}}}
    states: list[State] = [
        {"m": {"x": 1, "y": 2}, "l": [{"p": 1}], "o": {1: 2}, "deep": deep, "same": [{"n": 1}]},
        {
            "m": {"y": 2, "z": 3},
            "l": [{"p": 1}, {"q": 2}],
            "o": {"k": 0, (2, 3): 1, 1: 2},
            "same": [{"n": 1}],
        },
        {"own": {}, "o": {"k": 0}},
    ]
    whole = {
        "m": {"x": 1, "y": 2, "z": 3},
        "l": [{"p": 1}, {"q": 2}],
        "o": {1: 2, "k": 0, (2, 3): 1},
        "deep": deep,
        "same": [{"n": 1}],
        "own": {},
    }
    planned = plan(states)
    manifest = json.loads("{" + planned.publication.manifest_json + "}")
    assert manifest["structure"] == tree_to_json(capture(whole, None).tree)
    assert_equals_stock(planned, states)


def test_names_of_one_description_have_lists_of_their_own() -> None:
    """A reader may change what it got of one tensor."""
    entries = plan([{"a": torch.ones(2), "b": torch.ones(2)}]).metadata.state_dict_metadata
    one, other = entries["a"], entries["b"]
    assert isinstance(one, TensorStorageMetadata)
    assert isinstance(other, TensorStorageMetadata)
    assert one == other
    assert one is not other
    assert one.chunks is not other.chunks


def test_local_plan_of_a_known_structure_is_the_same_but_for_the_hashes() -> None:
    first = capture({"w": torch.ones(2), "n": 1}, None)
    local_plan = make_local_plan(first, None)
    later = capture({"w": torch.ones(2), "n": 2}, first.known)
    again = make_local_plan(later, local_plan)
    assert {key for key in local_plan if local_plan[key] != again[key]} == {"hashes"}  # type: ignore[literal-required]  # its keys


def test_local_plan_unpacks_to_what_was_captured() -> None:
    structure = capture({"w": torch.ones(2), "n": 1}, None).structure
    local_plan = travelled(make_local_plan(capture({"w": torch.ones(2), "n": 1}, None), None))
    assert unpack_tensors(local_plan["tensors"])["names"] == structure.tensor_names
    assert unpack_leaves(local_plan["leaves"])["names"] == structure.leaf_names
