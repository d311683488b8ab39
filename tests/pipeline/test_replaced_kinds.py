"""What lies under a name may be of another kind at the next save: the capture that remembers the last state
sees it, and what has no memory is refused by name, never read."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, SaveError, StagingOptions, StateMutatedError, Trust
from tests.property.states import Marked, difference, pictured
from tests.support import tensor_kinds
from tests.support.doubles import ASIDE_BYTES, KIB, FaultyStorage, assert_same, random_tensor
from tests.support.processes import run_in_process
from tests.support.tensor_kinds import KINDS

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # kinds that torch is about to give up warn when they are made
REFUSED = {"meta", "freed storage", "storage cut short", "in a vmap", "fake", "lazy", "lazy buffer", "mkldnn"}
"""What has no bytes, or none that torch.save could write and read again."""


@pytest.mark.usefixtures("process_server")
def test_each_kind_may_take_the_place_of_each_other() -> None:
    """In a process of its own: the guard behind the cache ends it where it is asked about a nested tensor."""
    assert run_in_process(tensor_kinds.replace_each_by_each) == len(KINDS) ** 2


async def test_what_takes_a_plain_tensors_place_is_what_is_loaded(root: Path) -> None:
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Marked,))) as engine:
        for step, name in enumerate(name for kind in KINDS for name in ("plain", kind)):
            value = KINDS[name]()
            if name in REFUSED:
                with pytest.raises(SaveError, match=r"\bw\b"):
                    await engine.save({"w": value, "beside": step}, step=step)
                continue
            response = await engine.save({"w": value, "beside": step}, step=step)
            await response.upload_completion
            found = await engine.read(step)
            assert difference(pictured(value), found["w"]) is None, name
            assert found["beside"] == step


@pytest.mark.parametrize("before", ["plain", "freed storage"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensor: tensor.untyped_storage().resize_(0),
        lambda tensor: tensor.untyped_storage().resize_(tensor.nbytes - 1),
        lambda tensor: tensor.set_(torch.zeros(3).untyped_storage(), 0, (0,)).set_(
            tensor.untyped_storage(), 0, (2,), (1,)
        ).untyped_storage().resize_(4),
    ],
    ids=["freed", "a byte short", "set_ and shrunk"],
)  # fmt: skip
async def test_a_tensor_without_its_memory_is_refused_by_name(
    root: Path, before: str, spoil: Callable[[torch.Tensor], object]
) -> None:
    state = {"m": {"w": random_tensor(torch.float32, (100, 10)), "b": torch.ones(3)}}
    async with CheckpointEngine(root) as engine:
        if before == "plain":  # then the capture cache has to see it
            await (await engine.save(state, step=0)).upload_completion
            await (await engine.save(state, step=1)).upload_completion
        spoil(state["m"]["w"])
        with pytest.raises(SaveError, match=r"m\.w: its storage holds"):
            await engine.save(state, step=2)


async def test_parameters_that_fsdp_has_freed_are_refused_and_gathered_ones_saved(root: Path) -> None:
    flat = torch.arange(1000.0)
    kept = flat.clone()  # no array was made of it, so its storage can be resized
    state = {"views": [flat[:500], flat[500:]]}
    async with CheckpointEngine(root) as engine:
        for step in range(4):
            flat.untyped_storage().resize_(0)
            with pytest.raises(SaveError, match=r"views\.0"):
                await engine.save(state, step=10 + step)
            flat.untyped_storage().resize_(4000)
            flat.copy_(kept)
            await (await engine.save(state, step=step)).upload_completion
            assert_same((await engine.read(step))["views"], [kept[:500], kept[500:]])


async def test_a_target_without_its_memory_is_refused_before_anything_is_touched(root: Path) -> None:
    state = {"a": torch.ones(4), "w": torch.ones(100)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state)).upload_completion
        target = {"a": torch.zeros(4), "w": torch.zeros(100)}
        target["w"].untyped_storage().resize_(0)
        with pytest.raises(Exception, match="w: its storage holds 0 bytes"):
            await engine.load(target)
        assert not target["a"].any()


@pytest.mark.parametrize("nbytes", [16 * KIB, 256 * KIB], ids=["small", "large"])
async def test_memory_that_is_freed_during_staging_fails_the_save(
    root: Path, faulty: FaultyStorage, nbytes: int
) -> None:
    part = 64 * KIB
    options = StagingOptions(part_bytes=part, budget_bytes=ASIDE_BYTES + 8 * part, overlap=True)
    state = {f"w{index:04d}": torch.ones(nbytes // 4) for index in range(2 * ASIDE_BYTES // nbytes)}
    last = list(state)[-1]
    async with CheckpointEngine(faulty, staging=options) as engine:
        with faulty.hold("put") as gate:
            response = await engine.save(state)
            await gate.until_arrived()
            assert not response.staging_completion.done()
            state[last].untyped_storage().resize_(0)
        with pytest.raises(StateMutatedError, match=last):
            await response.upload_completion
        with pytest.raises(SaveError):
            await response.staging_completion


def _tensor(value: float) -> torch.Tensor:
    return torch.full((3,), value)


TIED = _tensor(7.0)

ORDERS: dict[str, tuple[list[tuple[str, Any]], list[str]]] = {
    "tensor and leaf": ([("a", _tensor(1.0)), ("b", 1)], ["b", "a"]),
    "leaf between tensors": ([("a", _tensor(1.0)), ("b", 1), ("c", _tensor(2.0))], ["a", "c", "b"]),
    "tied tensors": ([("a", TIED), ("b", TIED), ("c", _tensor(2.0))], ["a", "c", "b"]),
    "sparse tensor and leaf": ([("a", torch.eye(2).to_sparse()), ("b", 1), ("c", TIED)], ["c", "a", "b"]),
    "containers and leaves": ([("a", {"x": 1}), ("b", 1), ("c", {"y": _tensor(1.0)})], ["b", "a", "c"]),
    "empty containers": ([("a", {}), ("b", _tensor(1.0)), ("c", [])], ["b", "a", "c"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", [dict, OrderedDict, Counter])
@pytest.mark.parametrize("case", ORDERS)
async def test_keys_come_back_in_the_order_of_the_last_save(
    root: Path, case: str, kind: type[dict[Any, Any]]
) -> None:
    entries, order = ORDERS[case]
    values = dict(entries)
    async with CheckpointEngine(root) as engine:
        for step in range(4):
            made = kind()
            for key in (values, order)[step % 2]:
                made[key] = values[key]
            await (await engine.save({"m": made}, step=step)).upload_completion
            found: Mapping[str, Any] = (await engine.read(step))["m"]
            assert list(found) == list(made)
            assert_same(found, made)
