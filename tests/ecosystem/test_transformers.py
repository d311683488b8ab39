"""Models of transformers: what save_pretrained writes is loaded as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the ecosystem session installs it")

from dcp_async import open_checkpoint  # noqa: E402 - after what may not be there


def small(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
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
