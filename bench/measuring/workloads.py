"""The states that the benches save and load: `large`, `llm`, `many`, `mixed`, and `grid:NUMxBYTES`.

In: a name and a scale (a fraction of the tensor count, for short runs). Out: a `Workload`, a nested state
dict of CPU tensors filled with a pattern that is different in each tensor and does not repeat at a block
boundary. `grid:1000x67108864` is 1,000 equal tensors of 64 MiB in all, for curves.
Keeps: the same name and scale give the same names, shapes and bits in each process, so a loaded state is
compared with the pattern and no process needs a second copy of the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .sizes import HUGE_BYTES, MEDIUM_KIB, NUM_MEDIUM, STATE_BYTES

PATTERN_PERIOD = 1_999_993
"""Elements of the base pattern; a prime, so that no repetition falls on a block, page or part boundary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A state with its tensors in a fixed order."""

    name: str
    state: dict[str, Any]
    tensors: tuple[torch.Tensor, ...]
    """Every tensor of `state`, in the order of the walk; index i carries pattern i."""
    nbytes: int


def build(name: str, scale: float = 1.0) -> Workload:
    """The named workload with about `scale` times its tensors, allocated, touched and filled."""
    if not 0 < scale <= 1:
        raise ValueError(f"scale is {scale}: give a fraction above 0, at most 1")
    if name == "large":
        state: dict[str, Any] = {
            "model": {f"w{i:02d}": torch.empty(2048, 2048) for i in range(_some(64, scale))}
        }
    elif name == "llm":
        state = _llm(_some(16, scale))
    elif name == "many":
        state = {"model": {f"layer{i:05d}.weight": torch.empty(32, 32) for i in range(_some(20_000, scale))}}
    elif name == "mixed":
        state = _mixed(_some(NUM_MEDIUM, scale), _some(4, scale))
    elif name.startswith("grid:"):
        count, total = (int(number) for number in name.removeprefix("grid:").split("x"))
        length = max(1, total // count // 4)
        state = {"model": {f"layer{i:06d}.weight": torch.empty(length) for i in range(_some(count, scale))}}
    else:
        raise ValueError(f"no workload named {name!r}: choose from {', '.join(STATE_BYTES)}")
    tensors = tuple(iter_tensors(state))
    with _one_thread():
        for index, tensor in enumerate(tensors):
            _fill(tensor, index)
    return Workload(name=name, state=state, tensors=tensors, nbytes=sum(t.nbytes for t in tensors))


def on_device(workload: Workload, device: torch.device) -> Workload:
    """The workload with its tensors on that device; the one that was given holds none of them there."""

    def moved(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            return node.to(device)
        if isinstance(node, dict):
            return {key: moved(child) for key, child in node.items()}
        return [moved(child) for child in node] if isinstance(node, list) else node

    state = moved(workload.state)
    return replace(workload, state=state, tensors=tuple(iter_tensors(state)))


def iter_tensors(node: Any) -> Iterator[torch.Tensor]:
    """The tensors below `node` in insertion order."""
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from iter_tensors(child)
    elif isinstance(node, list):
        for child in node:
            yield from iter_tensors(child)


def num_different(tensors: tuple[torch.Tensor, ...]) -> int:
    """How many tensors do not hold exactly the bits that `build` wrote."""
    with _one_thread():
        return sum(not _holds_pattern(tensor.cpu(), index) for index, tensor in enumerate(tensors))


@contextmanager
def _one_thread() -> Iterator[None]:
    # Thousands of barriers between threads take a minute where another process has one of the cores.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _some(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _base() -> torch.Tensor:
    return torch.randn(PATTERN_PERIOD, generator=torch.Generator().manual_seed(0))


_BASE = _base()


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(tensor.view(-1), PATTERN_PERIOD)


def _factor(index: int) -> float:
    return 1.0 + index / 32768


def _fill(tensor: torch.Tensor, index: int) -> None:
    for piece in _pieces(tensor):
        piece.copy_(_BASE[: piece.numel()] * _factor(index))


def _holds_pattern(tensor: torch.Tensor, index: int) -> bool:
    bits = torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32
    return all(
        torch.equal(piece.view(bits), (_BASE[: piece.numel()] * _factor(index)).to(tensor.dtype).view(bits))
        for piece in _pieces(tensor)
    )


def _mixed(num_medium: int, num_huge: int) -> dict[str, Any]:
    # A mixture of experts: thousands of matrices of 16 to 512 KiB, in turn float32 and bfloat16 by blocks of
    # eight, and the few huge ones that embedding and head are.
    def medium(index: int) -> torch.Tensor:
        dtype = torch.bfloat16 if index // len(MEDIUM_KIB) % 2 else torch.float32
        rows = MEDIUM_KIB[index % len(MEDIUM_KIB)] * 1024 // 256 // dtype.itemsize
        return torch.empty(rows, 256, dtype=dtype)

    def huge(index: int) -> torch.Tensor:
        dtype = torch.bfloat16 if index % 2 else torch.float32
        return torch.empty(HUGE_BYTES // 1024 // dtype.itemsize, 1024, dtype=dtype)

    experts = {
        f"layers.{index // 250}.experts.{index % 250 // 5}.w{index % 5}": medium(index)
        for index in range(num_medium)
    }
    return {"model": {**experts, **{f"embed{index}": huge(index) for index in range(num_huge)}}}


class _Attention(nn.Module):
    def __init__(self, width: int, kv_width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)


class _Layer(nn.Module):
    def __init__(self, width: int, kv_width: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = _Attention(width, kv_width)
        self.mlp = _Mlp(width, hidden)
        self.input_layernorm = nn.RMSNorm(width)
        self.post_attention_layernorm = nn.RMSNorm(width)


class _Llama(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        width, kv_width, hidden, vocabulary = 1024, 256, 2816, 16_384
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, kv_width, hidden) for _ in range(num_layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)


def _llm(num_layers: int) -> dict[str, Any]:
    # Fine-tuning of the decoder layers: embedding, last norm and head are frozen, so AdamW holds state for
    # 144 of the 147 parameters: 147 + 3 * 144 = 579 tensors. The modules live on the meta device: only names
    # and shapes are needed.
    with torch.device("meta"):
        model = _Llama(num_layers)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trained = [name for name in shapes if name.startswith("layers.")]
    optimizer_state = {
        name: {
            "step": torch.empty(()),
            "exp_avg": torch.empty(shapes[name]),
            "exp_avg_sq": torch.empty(shapes[name]),
        }
        for name in trained
    }
    group = {
        "lr": 3e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "foreach": None,
        "params": trained,
    }
    return {
        "model": {name: torch.empty(shape) for name, shape in shapes.items()},
        "optim": {"state": optimizer_state, "param_groups": [group]},
    }
