"""Files that all ranks write: the same bytes as one rank would write, however tensors are cut."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dcp_async.formats import BLOCK_BYTES, LOOSE, SafetensorsFormat
from dcp_async.planning.all_plans import AllPlans
from dcp_async.planning.assignment import assign
from dcp_async.planning.conflicts import ConflictError
from dcp_async.planning.global_plan import GlobalPlan
from dcp_async.planning.local_plan import make_local_plan
from dcp_async.planning.merging import Assembly, dealt, spans_between
from dcp_async.planning.planner import CompiledPlan, compile_plan
from dcp_async.state.capture import Captured, capture
from dcp_async.trust.plain_data import dumps, loads
from tests.support.pieces import Box, Pieces

UID = "0123456789abcdef"
State = dict[str, Any]


def travelled(message: Any) -> Any:
    return loads(dumps(message))


def plan(
    states: Sequence[State], format: SafetensorsFormat
) -> tuple[list[Captured], list[CompiledPlan], list[Any]]:
    """As the ranks and their coordinator do it: what each captured, its plan, and what it puts together."""
    captured = [capture(state, None, rank=rank) for rank, state in enumerate(states)]
    drafts = [make_local_plan(mine, None) for mine in captured]
    all_plans = AllPlans([travelled(draft) for draft in drafts])
    shared = GlobalPlan(all_plans)
    answers, shares = assign(all_plans), travelled(list(shared.public_shares(format)))
    plans = []
    for rank, (mine, draft, answer) in enumerate(zip(captured, drafts, answers, strict=True)):
        compiled, locations = compile_plan(
            mine, draft, answer, UID, shared, format=format, public=shares[rank]
        )
        shared.locate(rank, travelled(locations))
        plans.append(compiled)
    merges = travelled(list(shared.merges()))
    shared.publication(format)
    return captured, plans, merges


def image_of(captured: Captured, plan: CompiledPlan) -> bytearray:
    layout = plan.layout
    image = bytearray(b"\xaa" * layout.image_bytes)
    layout.fill_constants(memoryview(image), 0)
    payloads = zip(plan.tensors, layout.payload_offsets, layout.payload_bytes, strict=True)
    for index, offset, nbytes in payloads:
        raw = captured.tensors[index].detach().contiguous().reshape(-1).view(torch.uint8)
        image[offset : offset + nbytes] = raw.numpy().tobytes()
    return image


def written(states: Sequence[State], format: SafetensorsFormat) -> dict[str, bytes]:
    """Public name -> content. No byte is written twice."""
    captured, plans, merges = plan(states, format)
    public = plans[0].layout.public
    files = [bytearray(nbytes) for _, nbytes in public]
    times = [Counter[int]() for _ in public]
    loose = []
    for mine, compiled in zip(captured, plans, strict=True):
        image, kept = image_of(mine, compiled), bytearray(compiled.layout.image_bytes)
        for low, high, file, offset in compiled.layout.runs.between(0, len(image)):
            if file == LOOSE:
                kept[offset : offset + high - low] = image[low:high]
            else:
                assert low % BLOCK_BYTES == offset % BLOCK_BYTES == 0
                files[file][offset : offset + high - low] = image[low:high]
                times[file].update(range(offset // BLOCK_BYTES, -(-(offset + high - low) // BLOCK_BYTES)))
        loose.append(kept)
    for merge in filter(None, merges):
        for file, start, stop in merge["spans"]:
            assert start % BLOCK_BYTES == 0
            for low in range(start, stop, 3 * BLOCK_BYTES):
                high = min(low + 3 * BLOCK_BYTES, stop)
                for read in Assembly(merge).reads(file, low, high, 1 << 20):
                    source = memoryview(loose[read.rank])[read.start : read.stop]
                    read.scatter(source, memoryview(files[file])[low:high])
            times[file].update(range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)))
    for (_, nbytes), counted in zip(public, times, strict=True):
        assert counted == Counter(range(-(-nbytes // BLOCK_BYTES)))
    return {name: bytes(content) for (name, _), content in zip(public, files, strict=True)}


def cut(shape: Sequence[int], chance: random.Random) -> list[Box]:
    """``shape`` cut in some dimensions, unevenly."""
    sides = []
    for extent in shape:
        edges = sorted({0, extent, *(chance.randint(0, extent) for _ in range(chance.choice([0, 0, 1, 2])))})
        sides.append(list(pairwise(edges)) or [(0, 0)])
    return [(tuple(low for low, _ in box), tuple(high - low for low, high in box)) for box in product(*sides)]


def filled(shape: Sequence[int], dtype: torch.dtype, chance: random.Random) -> torch.Tensor:
    raw = chance.randbytes(math.prod(shape) * dtype.itemsize)
    return (
        torch.frombuffer(bytearray(raw), dtype=dtype).reshape(*shape)
        if raw
        else torch.zeros(*shape, dtype=dtype)
    )


SHAPES = [(7,), (300, 1000), (3, 5, 7), (0, 4), (40, 33, 257), (1, 400_001), (9000, 70)]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 1 << 32),
    st.sampled_from([400_000, 1 << 30]),
)
def test_ranks_write_the_bytes_of_one_rank(
    num_ranks: int, num_tensors: int, seed: int, shard_bytes: int
) -> None:
    chance = random.Random(seed)
    wholes = {
        f"t{number}": filled(
            chance.choice(SHAPES), chance.choice([torch.uint8, torch.bfloat16, torch.int64]), chance
        )
        for number in range(num_tensors)
    }
    states: list[State] = [{"step": 1} for _ in range(num_ranks)]
    for name, whole in wholes.items():
        boxes = [box for box in cut(whole.shape, chance) if 0 not in box[1]]
        owners = [chance.sample(range(num_ranks), chance.choice([1, 1, num_ranks])) for _ in boxes]
        for rank, state in enumerate(states):
            mine = [box for box, ranks in zip(boxes, owners, strict=True) if rank in ranks]
            # by a hook of DCP's; a tensor of no elements has no piece anywhere
            state[name] = Pieces.of(whole, mine) if whole.numel() else whole
    chosen = SafetensorsFormat(max_shard_bytes=shard_bytes)
    one = written([{**wholes, "step": 1}], chosen)
    assert written(states, chosen) == one


def test_one_rank_has_nothing_to_put_together() -> None:
    state = {"a": torch.zeros(300_000), "b": torch.ones(3, dtype=torch.int8), "n": 1}
    _, (compiled,), merges = plan([state], SafetensorsFormat())
    assert merges == [None]
    assert compiled.layout.runs.loose_end == 0


def test_whole_blocks_of_a_shard_are_written_in_place() -> None:
    whole = torch.arange(4 << 20, dtype=torch.uint8).reshape(4, 1 << 20)
    states = [{"w": Pieces.of(whole, [((2 * rank, 0), (2, 1 << 20))])} for rank in range(2)]
    _, plans, merges = plan(states, SafetensorsFormat())
    for compiled in plans:
        runs = compiled.layout.runs
        in_place = sum(
            stop - start
            for start, stop, file in zip(runs.starts, runs.stops, runs.files, strict=True)
            if file != LOOSE
        )
        assert in_place >= (2 << 20) - 2 * BLOCK_BYTES
    spans = [span for merge in merges for span in merge["spans"]]
    # where the two shards meet
    assert sum(stop - start for _, start, stop in spans) == BLOCK_BYTES


def test_tied_names_that_ranks_see_otherwise_lie_beside() -> None:
    weight = torch.ones(4)
    states: list[State] = [{"x": weight, "y": weight}, {"y": torch.ones(4)}]
    _, plans, _ = plan([{**states[0], "z": torch.ones(2)}, states[1]], SafetensorsFormat())
    names = {name for name, _ in plans[0].layout.public}
    assert names == {"model.safetensors"}
    assert sum(nbytes for _, nbytes in plans[0].layout.public) < 200


def test_two_writers_of_a_block_are_refused() -> None:
    with pytest.raises(ConflictError, match="byte 5"):
        list(spans_between(0, 20, [(0, 10), (5, 20)]))


def test_spans_are_dealt_by_blocks() -> None:
    shares = dealt([(0, 0, 3 * BLOCK_BYTES), (1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1)], 2)
    blocks = [sum(-(-(stop - start) // BLOCK_BYTES) for _, start, stop in share) for share in shares]
    assert blocks == [3, 2]
    assert array("Q", [start for share in shares for _, start, _ in share]) == array("Q", [0, BLOCK_BYTES])
