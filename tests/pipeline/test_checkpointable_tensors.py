"""Tensors that carry torch's CheckpointableTensor protocol, in one process; tests/distributed has several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import CheckpointEngine, IncompatibleStateError, SaveError
from dcp_async.state.checkpointable import HAS_PROTOCOL
from tests.support.doubles import random_tensor

has_protocol = pytest.mark.skipif(not HAS_PROTOCOL, reason="new in torch 2.14.1")
WHOLE = random_tensor(torch.float32, (6, 4), 1)


def carrying(tensor: torch.Tensor, **changes: Any) -> torch.Tensor:
    """``tensor`` with the protocol: rows [0, 3) and [3, 6) of ``WHOLE``'s size, a row of padding between."""
    fields = {
        "global_shape": (6, 4),
        "global_offsets": ((0, 0), (3, 0)),
        "local_offsets": ((0, 0), (4, 0)),
        "local_sizes": ((3, 4), (3, 4)),
    }
    for name, value in (fields | changes).items():
        setattr(tensor, name, value)
    return tensor


def padded(whole: torch.Tensor = WHOLE) -> torch.Tensor:
    return torch.cat([whole[:3], torch.full((1, 4), -1.0), whole[3:]]).clone()


async def saved(engine: CheckpointEngine, state: dict[str, Any], step: int = 0) -> dict[str, Any]:
    """``state`` as the checkpoint has it."""
    await (await engine.save(state, step=step)).upload_completion
    return await engine.read(step)


KINDS: dict[str, Any] = {
    "a tensor": padded,
    "a parameter": lambda: nn.Parameter(padded()),
    "a frozen parameter": lambda: nn.Parameter(padded(), requires_grad=False),
    "a view": lambda: torch.cat([padded(), padded()], 1)[:, 4:],
    "a transposed one": lambda: padded().t().contiguous().t(),
}


@has_protocol
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
async def test_parts_are_put_together_and_taken_apart(root: Path, make: Any) -> None:
    async with CheckpointEngine(root) as engine:
        found = await saved(engine, {"m": {"w": carrying(make()), "b": torch.ones(2)}})
        assert torch.equal(found["m"]["w"], WHOLE)
        target = carrying(make())
        with torch.no_grad():
            target.fill_(9)
        await engine.load({"m": {"w": target, "b": torch.zeros(2)}})
    expected = padded()
    expected[3] = 9  # the padding is nobody's
    assert torch.equal(target.detach(), expected)


@has_protocol
@pytest.mark.parametrize("overlap", [False, True])
async def test_a_tensor_that_becomes_a_part_between_saves_is_seen(root: Path, overlap: bool) -> None:
    from dcp_async import StagingOptions

    state = {"a": torch.ones(3), "w": padded(), "z": {"x": torch.zeros(5)}}
    async with CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:
        for step in range(3):
            assert torch.equal((await saved(engine, state, step))["w"], padded())
        carrying(state["w"])  # type: ignore[arg-type]
        assert torch.equal((await saved(engine, state, 3))["w"], WHOLE)
        for name in ("global_shape", "global_offsets", "local_offsets", "local_sizes"):
            delattr(state["w"], name)
        assert torch.equal((await saved(engine, state, 4))["w"], padded())


@has_protocol
async def test_what_is_done_to_it_later_is_saved_too(root: Path) -> None:
    whole, part = WHOLE.clone(), carrying(padded())
    async with CheckpointEngine(root) as engine:
        for step in range(3):
            assert torch.equal((await saved(engine, {"w": part}, step))["w"], whole)
            part.add_(1)
            whole.add_(1)


@has_protocol
async def test_moments_of_a_parameter_that_is_a_part_come_back_as_parts(root: Path) -> None:
    def trained(steps: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(padded())
        carrying(parameter)
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        for _ in range(steps):
            parameter.grad = parameter.detach() / 2
            optimizer.step()
        for value in optimizer.state[parameter].values() if steps else ():
            if value.dim():
                carrying(value)
        return parameter, optimizer

    _, source = trained(2)
    (before,) = source.state.values()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"optim": source})
        parameter, target = trained(0)
        await engine.load({"optim": target})
    after = target.state[parameter]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[name][:3], before[name][:3])
        assert torch.equal(after[name][4:], before[name][4:])
    parameter.grad = torch.ones(7, 4)
    target.step()


WRONG: dict[str, dict[str, Any]] = {
    "outside of the whole": {"global_offsets": ((0, 0), (4, 0))},
    "outside of the tensor": {"local_offsets": ((0, 0), (5, 0))},
    "other numbers of them": {"local_sizes": ((3, 4),)},
    "other dimensions": {"global_shape": (6, 4, 1)},
    "no numbers": {"global_shape": None},
    "texts": {"global_offsets": (("0", "0"), ("3", "0"))},
    "one place twice": {"global_offsets": ((0, 0), (0, 0))},
    "a hole": {"global_offsets": ((0, 0),), "local_offsets": ((0, 0),), "local_sizes": ((3, 4),)},
    "an overlap": {"global_offsets": ((0, 0), (2, 0))},
}


@has_protocol
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
async def test_parts_that_make_no_sense_are_refused_by_name(root: Path, changes: dict[str, Any]) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"m\.w"):
            await saved(engine, {"m": {"w": carrying(padded(), **changes)}})
        assert await engine.latest() is None


@has_protocol
async def test_another_global_size_does_not_fit(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"w": torch.ones(7, 4)})
        target = carrying(padded())
        with pytest.raises(
            IncompatibleStateError, match=r"w is \(6, 4\).*\(7, 4\) torch.float32 in the checkpoint"
        ):
            await engine.load({"w": target})
    assert torch.equal(target, padded())


@pytest.mark.skipif(HAS_PROTOCOL, reason="from torch 2.14.1 on they mean something")
async def test_the_attributes_mean_nothing_where_torch_has_no_such_protocol(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        assert torch.equal((await saved(engine, {"w": carrying(padded())}))["w"], padded())
        target = carrying(torch.zeros(7, 4))
        await engine.load({"w": target})
    assert torch.equal(target, padded())


@has_protocol
async def test_some_of_the_attributes_make_no_part(root: Path) -> None:
    tensor = padded()
    tensor.global_offsets = ((0, 0),)  # type: ignore[attr-defined]
    async with CheckpointEngine(root) as engine:
        for step in range(2):
            assert torch.equal((await saved(engine, {"w": tensor}, step))["w"], padded())
