"""Models of transformers: what save_pretrained writes is loaded as it is."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

transformers = pytest.importorskip("transformers", reason="the ecosystem session installs it")

from dcp_async import CheckpointEngine, open_checkpoint  # noqa: E402 - after what may not be there
from dcp_async.formats import SafetensorsFormat  # noqa: E402
from dcp_async.sync import CheckpointEngine as BlockingEngine  # noqa: E402

WORLD = 2


def small(seed: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


@pytest.mark.parametrize("shard_bytes", ["5GB", "20KB"])
async def test_a_pretrained_model_is_loaded_and_says_the_same(shard_bytes: str, tmp_path: Path) -> None:
    saved = small(0)
    saved.save_pretrained(tmp_path / "hf", max_shard_size=shard_bytes)  # type: ignore[operator]
    with torch.device("meta"):
        model = small(1)
    model.to_empty(device="cpu")
    async with open_checkpoint(tmp_path / "hf") as checkpoint:
        await checkpoint.load({"model": model}, rename={"*": "model.*"}, strict=True)
    tokens = torch.arange(12).reshape(2, 6)
    # buffers that are not saved are made by the model's own code
    fresh = small(2)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(tokens).logits, saved(tokens).logits)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
@pytest.mark.parametrize("tied", [False, True])
async def test_transformers_loads_the_model_of_a_training_checkpoint(
    shard_bytes: int, tied: bool, tmp_path: Path
) -> None:
    model: Any = small(0, tie_word_embeddings=tied)
    optim = torch.optim.AdamW(model.parameters())
    chosen = SafetensorsFormat("model", max_shard_bytes=shard_bytes)
    async with CheckpointEngine(tmp_path, format=chosen) as engine:
        await (await engine.save({"model": model, "optim": optim}, step=1)).upload_completion
    directory = tmp_path / "step-00000001"
    assert (directory / "model.safetensors.index.json").exists() == (shard_bytes == 20_000)
    model.config.save_pretrained(directory)
    loaded = transformers.LlamaForCausalLM.from_pretrained(directory).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def _save_sharded(rank: int, port: int, root: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    model: Any = small(0)
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = torch.optim.AdamW(model.parameters())
    with BlockingEngine(root, format=SafetensorsFormat("model")) as engine:
        engine.save({"model": model, "optim": optim}, step=1)
    dist.destroy_process_group()


def test_transformers_loads_what_ranks_of_fsdp_wrote_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn: Any = torch.multiprocessing.spawn
    spawn(_save_sharded, (port, str(tmp_path / "ranks")), nprocs=WORLD)
    model: Any = small(0)
    directory = tmp_path / "ranks" / "step-00000001"
    model.config.save_pretrained(directory)
    loaded = transformers.LlamaForCausalLM.from_pretrained(directory).eval()
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    with BlockingEngine(tmp_path / "one", format=SafetensorsFormat("model")) as engine:
        engine.save({"model": model}, step=1)
    alone = tmp_path / "one" / "step-00000001" / "model.safetensors"
    assert (directory / "model.safetensors").read_bytes() == alone.read_bytes()
