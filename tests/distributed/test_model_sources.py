"""Ranks load their shards of a model in files of others together, and each reads no more than its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcp_async import CheckpointEngine, LoadError
from tests.support.processes import run_in_processes

SIZE = 2
SLACK_BYTES = 256 << 10
"""Headers, the index, and what this process reads of its own pipes meanwhile."""


def net() -> nn.Sequential:
    # the last one has nothing for the second rank
    return nn.Sequential(nn.Linear(1024, 2048), nn.Linear(2048, 512), nn.LayerNorm(512), nn.Linear(512, 1))


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in net().state_dict().items()}


def write_model(directory: Path) -> None:
    directory.mkdir()
    made = weights()
    files = {name: f"model-0000{1 + int(name[0]) % 2}-of-00002.safetensors" for name in made}
    for file in set(files.values()):
        save_file({name: made[name] for name in made if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def write_quantised(directory: Path) -> None:
    """The same model with its matrices in FP8, in blocks of 128x128."""
    directory.mkdir()
    made = {name: value.bfloat16() for name, value in weights().items()}
    for name in ("0.weight", "1.weight"):
        scales = torch.rand(*(extent // 128 for extent in made[name].shape)) + 0.5
        made |= {name: made[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(made, directory / "model.safetensors")


def read_bytes() -> int:
    """What this process has read by now, of files, caches and pipes, as the system counts it."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counters["rchar"])


def run_rank(rank: int, root: str) -> dict[str, Any]:
    """What a rank saw."""
    store = dist.FileStore(f"{root}/store", SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    try:
        return asyncio.run(_run_rank(rank, root))
    finally:
        dist.destroy_process_group()


def sharded(mesh: Any) -> nn.Sequential:
    """The model on the meta device, cut by FSDP2."""
    with torch.device("meta"):
        model = net()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def holds_its_shards(model: nn.Module) -> bool:
    expected = weights()
    return all(
        isinstance(value, DTensor) and torch.equal(value.full_tensor(), expected[name])
        for name, value in model.state_dict().items()
    )


async def _run_rank(rank: int, root: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (SIZE,))
    seen: dict[str, Any] = {}
    async with CheckpointEngine(f"{root}/own") as engine:
        model = sharded(mesh)
        model.to_empty(device="cpu")
        needed = sum(value.to_local().nbytes for value in model.state_dict().values())
        before = read_bytes()
        report = await engine.load({"model": model}, f"{root}/hf", rename={"*": "model.*"})
        seen["more than needed"] = read_bytes() - before - needed
        seen["needed"] = needed == report.nbytes
        seen["shards"] = holds_its_shards(model)
        before = read_bytes()
        model = sharded(mesh)
        model.to_empty(device="cpu")
        await engine.load({"model": model}, f"{root}/model.pt", rename={"*": "model.*"})
        seen["more than needed of a .pt file"] = read_bytes() - before - needed
        seen["shards of a .pt file"] = holds_its_shards(model)
        async with engine.checkpoint(f"{root}/hf") as checkpoint:
            again = sharded(mesh)  # no to_empty(): its shards are made by the load
            before = read_bytes()
            await checkpoint.load({"model": again}, rename={"*": "model.*"})
            seen["more than needed by meta"] = read_bytes() - before - needed
            seen["opened"] = holds_its_shards(again)
            seen["kinds"] = {(type(value), value.requires_grad) for value in again.parameters()} == {
                (type(value), value.requires_grad) for value in model.parameters()
            }
            batch = torch.randn(3, 1024)
            seen["forward"] = torch.equal(again(batch), model(batch))
            again(batch).sum().backward()
            optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
            optimizer.step()
            seen["trains"] = not torch.equal(again(batch), model(batch))
        seen |= await _load_quantised(engine, mesh, f"{root}/fp8")
        seen["read alone"] = torch.equal((await engine.read(f"{root}/hf"))["2.bias"], weights()["2.bias"])
        for name, source in (("lacks a shard", "lacking"), ("is not there", "absent"), ("no fit", "hf")):
            target = {"2.bias": torch.zeros(512), "2.weight": torch.zeros(512 + (rank and name == "no fit"))}
            try:
                await engine.load(target, f"{root}/{source}")
            except LoadError as error:
                seen[name] = (type(error).__name__, str(error), target["2.bias"].any().item())
    return seen


async def _load_quantised(engine: CheckpointEngine, mesh: Any, path: str) -> dict[str, Any]:
    """What a rank saw of FP8 that was made plain for its shards."""
    model = sharded(mesh).bfloat16()
    model.to_empty(device="cpu")
    local = {name: value.to_local() for name, value in model.state_dict().items()}
    # of what is stored, two matrices have half as many bytes
    needed = sum(value.nbytes // (1 + (name in ("0.weight", "1.weight"))) for name, value in local.items())
    before = read_bytes()
    await engine.load({"model": model}, path, rename={"*": "model.*"}, dequantize=torch.bfloat16)
    more = read_bytes() - before - needed
    expected = await engine.read(path, dequantize=torch.bfloat16)
    same = [torch.equal(value.full_tensor(), expected[name]) for name, value in model.state_dict().items()]
    return {"fp8 more than needed": more, "fp8": all(same)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "hf")
    write_quantised(root / "fp8")
    torch.save(weights(), root / "model.pt")
    write_model(root / "lacking")
    (root / "lacking" / "model-00002-of-00002.safetensors").unlink()
    return run_in_processes([(run_rank, (rank, str(root))) for rank in range(SIZE)])


def test_a_model_cut_by_fsdp2_is_filled_and_each_rank_reads_its_shards_alone(
    seen: list[dict[str, Any]],
) -> None:
    for one in seen:
        assert one["shards"]
        assert one["needed"]
        assert 0 <= one["more than needed"] < SLACK_BYTES, one["more than needed"]
        assert one["shards of a .pt file"]
        assert 0 <= one["more than needed of a .pt file"] < SLACK_BYTES
        assert one["read alone"]


def test_shards_on_the_meta_device_are_made_by_the_load(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert one["opened"]
        assert one["kinds"]
        assert 0 <= one["more than needed by meta"] < SLACK_BYTES
        assert one["forward"]
        assert one["trains"]


def test_a_quantised_model_is_made_plain_shard_by_shard(seen: list[dict[str, Any]]) -> None:
    for one in seen:
        assert one["fp8"]
        assert 0 <= one["fp8 more than needed"] < SLACK_BYTES, one["fp8 more than needed"]


def test_what_fails_on_a_rank_fails_on_all_and_nothing_is_loaded(seen: list[dict[str, Any]]) -> None:
    for name, kind, words in (
        ("lacks a shard", "CorruptCheckpointError", "which is not there"),
        ("is not there", "CheckpointNotFoundError", "there is no such file or directory"),
        ("no fit", "IncompatibleStateError", "(513,)"),
    ):
        for one in seen:
            told, text, touched = one[name]
            assert (told, touched) == (kind, False)
            assert words in text
