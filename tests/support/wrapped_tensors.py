"""A tensor subclass around others, as quantized optimizer states are, and a job of ranks that saves and loads
distributed tensors of it."""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dcp_async import CheckpointEngine, Trust
from tests.support.processes import run_in_processes

ROWS, COLUMNS, BLOCK = 8, 64, 32
aten = torch.ops.aten


class Blocks(torch.Tensor):
    """Codes of the shape that it has outside, a scale for each block of them, and a table that all share."""

    codes: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor
    signed: bool

    @staticmethod
    def __new__(
        cls: Any,
        codes: torch.Tensor,
        scale: torch.Tensor,
        table: torch.Tensor,
        signed: bool,
        dtype: Any = None,
    ) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, device=codes.device, dtype=dtype or torch.float32
        )
        made.codes, made.scale, made.table, made.signed = codes, scale, table, signed
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        assert self.codes.numel() % self.scale.numel() == 0

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "table"], [self.signed, self.dtype]

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any
    ) -> Any:
        return cls(inner["codes"], inner["scale"], inner["table"], *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself asks for a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0]
        if func is aten.slice.Tensor:
            _, dim, low, high = (*args, None, None)[:4]
            block = first.codes.numel() // first.scale.numel()
            row = math.prod(first.shape[1:])
            if dim != 0 or low * row % block or high * row % block:
                raise ValueError(f"rows {low} to {high} are no whole blocks of {block}")
            scale = first.scale[low * row // block : high * row // block]
            return Blocks(first.codes[low:high], scale, first.table.clone(), first.signed)
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            return Blocks(
                *(func(each) for each in (first.codes, first.scale, first.table)), first.signed, first.dtype
            )
        if func is aten.is_pinned.default:
            return False
        if func is aten._to_copy.default:
            return Blocks(first.codes, first.scale, first.table, first.signed, (kwargs or {}).get("dtype"))
        if func is aten.view.default:
            return Blocks(first.codes.view(args[1]), first.scale, first.table, first.signed, first.dtype)
        if func is aten.copy_.default and isinstance(args[1], Blocks):
            for name in ("codes", "scale"):
                getattr(first, name).copy_(getattr(args[1], name))
            return first
        raise NotImplementedError(f"{func} of Blocks")


def blocks(first: int, rows: int, *, block: int = BLOCK, zero: bool = False, signed: bool = True) -> Blocks:
    """Rows [first, first + rows) of a tensor that every rank can make."""
    codes = torch.arange(ROWS * COLUMNS, dtype=torch.int32).remainder(251).to(torch.uint8).view(ROWS, COLUMNS)
    scale = torch.arange(ROWS * COLUMNS // block).float() + 0.5
    table = torch.arange(16.0) * 3
    part = codes[first : first + rows].clone()
    scales = scale[first * COLUMNS // block : (first + rows) * COLUMNS // block].clone()
    if zero:
        part.zero_(), scales.zero_()
    return Blocks(part, scales, table, signed, torch.bfloat16)


class Keeper(torch.optim.Optimizer):
    """An optimizer whose state is made of Blocks, of the layout of its parameter."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def make(self, **options: Any) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                local = local_blocks(parameter, **options)
                self.state[parameter] = {"step": torch.tensor(3.0), "moment": wrapped(parameter, local)}


def local_blocks(parameter: Any, **options: Any) -> Blocks:
    if not isinstance(parameter, DTensor):
        return blocks(0, ROWS, **options)
    rows = parameter.to_local().shape[0]
    is_cut = isinstance(parameter.placements[0], Shard)
    return blocks(dist.get_rank() * rows if is_cut else 0, rows, **options)


def wrapped(parameter: Any, local: Blocks) -> Any:
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def inner(value: Any) -> list[torch.Tensor]:
    local = value.to_local() if isinstance(value, DTensor) else value
    assert type(local) is Blocks, type(local)
    assert (local.signed, local.dtype) == (True, torch.bfloat16), (local.signed, local.dtype)
    return [local.codes, local.scale, local.table]


def same(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(inner(left), inner(right), strict=True))


def rank_main(verb: str, root: str) -> str:
    """One rank's part; says what it found. ``verb``: what to do, then where it differs ``:layout`` and the
    checkpoint ``@name``."""
    verb, _, layout = verb.partition(":")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    verb, _, source = verb.partition("@")
    placement = Replicate() if layout else Shard(0)
    full = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(distributed(full, mesh, placement))
    optimizer = Keeper([parameter])
    expected = wrapped(parameter, local_blocks(parameter))
    settings: dict[str, dict[str, Any]] = {
        "load-block": {"block": 16},
        "load-unsigned": {"signed": False},
        "save-large": {"block": 256},
    }
    optimizer.make(zero=not verb.startswith("save"), **settings.get(verb, {}))
    if verb == "fresh":
        optimizer.state.clear()
    if verb == "save-stock":
        held = {"optim": {"state": {"0": {"moment": optimizer.state[parameter]["moment"]}}}}
        dcp.save(held, checkpoint_id=Path(root) / "stock")
        return "saved"
    if verb == "stock":
        torch.serialization.add_safe_globals([Blocks])
        target = {"optim": {"moment": optimizer.state[parameter]["moment"]}}
        dcp.load(
            {"optim": {"state": {"0": target["optim"]}}}, checkpoint_id=str(Path(root) / "step-00000001")
        )
        return "same" if same(target["optim"]["moment"], expected) else "other"

    async def run() -> str:
        async with CheckpointEngine(root, trust=Trust(safe_globals=(Blocks,))) as engine:
            if verb.startswith("save"):
                name = "large" if verb == "save-large" else None
                for step in range(2):
                    response = await engine.save(
                        {"optim": optimizer, "n": step},
                        step=None if name else step,
                        checkpoint_id=name,
                        replace=True,
                    )
                    await response.upload_completion
                return "saved"
            if verb == "read":
                found = (await engine.read("step-00000001"))["optim"]["state"][0]["moment"]
                return "same" if same(found, blocks(0, ROWS)) else "other"
            held = optimizer.state.get(parameter, {}).get("moment")
            try:
                moment = {"optim": {"state": {"0": {"moment": held}}}}
                state = moment if source == "stock" else {"optim": optimizer, "n": 0}
                await engine.load(state, source or "step-00000001", atomic=verb == "atomic")
            except Exception as error:  # what it is is what the test asks for
                local = held.to_local() if held is not None else None
                untouched = local is None or not (local.codes.any() or local.scale.any())
                return f"{type(error).__name__}: {error} untouched={untouched}"
        found = optimizer.state[parameter]["moment"]
        return "same" if same(found, expected) else "other"

    return asyncio.run(run())


def distributed(full: torch.Tensor, mesh: Any, placement: Any) -> torch.Tensor:
    """The same on all ranks, without a collective."""
    rows = ROWS // mesh.size() if isinstance(placement, Shard) else ROWS
    return DTensor.from_local(full[:rows].clone(), mesh, [placement], shape=full.shape, stride=full.stride())


def job(root: Path, world: int, *verbs: str) -> dict[str, list[str]]:
    """What the ranks of a job say to each verb."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/rendezvous"
        answers = run_in_processes(
            [(_rank, (str(root), meeting, rank, world, verbs)) for rank in range(world)]
        )
    return {verb: [said[number] for said in answers] for number, verb in enumerate(verbs)}


def _rank(root: str, meeting: str, rank: int, world: int, verbs: tuple[str, ...]) -> list[str]:
    """In a process of its own: what this rank says to each verb."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    answers = []
    for verb in verbs:
        answers.append(rank_main(verb, root))
        dist.barrier()
    dist.destroy_process_group()
    return answers
