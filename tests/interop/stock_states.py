"""States that need no seed, and what stock makes of them: shared by tests, rank jobs and golden files.

Needs torch alone, of any version and on any Python: make_golden.py runs where nothing else is installed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def ramp(shape: Sequence[int], dtype: torch.dtype = torch.float32, salt: int = 0) -> torch.Tensor:
    """Numbers that follow from their place alone, each exact in every dtype."""
    numbers = (torch.arange(math.prod(shape)) * 37 + salt * 11) % 101
    if dtype is torch.bool:
        numbers = numbers % 2
    elif dtype.is_floating_point or dtype.is_complex:
        return ((numbers - 50) / 4).to(dtype).reshape(tuple(shape))
    return numbers.to(dtype).reshape(tuple(shape))


def nested_state() -> dict[str, Any]:
    """What a trainer saves: nested, with int keys, empty and scalar tensors, values and lists."""
    return {
        "model": {
            "weight": ramp((24, 15), salt=1),
            "half": ramp((30,), torch.bfloat16, 2),
            "mask": ramp((3, 5), torch.bool, 3),
            "empty": ramp((0, 4)),
            "scalar": ramp((), torch.int64, 4),
        },
        "optim": {
            "state": {
                0: {"step": ramp((), salt=5), "exp_avg": ramp((24, 15), salt=6)},
                1: {"step": ramp((), salt=7), "exp_avg": ramp((30,), torch.float64, 8)},
            },
            "param_groups": [{"lr": 0.125, "params": [0, 1], "foreach": None}],
        },
        "epoch": 3,
        "note": ["x", {"y": 1.5}],
    }


def strided_state() -> dict[str, Any]:
    base = ramp((6, 8), salt=1)
    return {
        "transposed": base.t(),
        "stepped": base[::2, 1::3],
        "channels_last": ramp((2, 3, 4, 5), salt=2).to(memory_format=torch.channels_last),
        "permuted": ramp((3, 4, 5), torch.int16, 3).permute(2, 0, 1),
        "narrow": base[2:4],
    }


def leaf_state() -> dict[str, Any]:
    return {
        "blob": bytes(range(256)) * 4,
        "text": "x" * 300,
        "tuple": (1, ramp((5,), salt=9), {"deep": [None, True]}),
        "none": None,
        "number": 2**70,
        "tensor": ramp((4, 4), salt=10),
    }


def as_stock_returns(state: Any) -> Any:
    """Stock turns the keys of mappings into text; within leaves, such as tuples, they stay."""
    if isinstance(state, Mapping):
        return {str(key): as_stock_returns(value) for key, value in state.items()}
    if isinstance(state, list):
        return [as_stock_returns(value) for value in state]
    return state


SHARDED: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
    "even": ((8, 6), torch.float32, 0),
    "uneven": ((7, 5), torch.bfloat16, 0),
    "few_rows": ((3, 4), torch.int32, 0),  # fewer than four ranks: empty shards
    "columns": ((5, 9), torch.float64, 1),
    "vector": ((10,), torch.float16, 0),
}
"""Name -> (shape, dtype, the dimension that is sharded)."""


def sharded_whole() -> dict[str, Any]:
    """What a sharded checkpoint holds when it is put together; see rank_jobs.py."""
    state: dict[str, Any] = {
        name: ramp(shape, dtype, salt) for salt, (name, (shape, dtype, _)) in enumerate(SHARDED.items())
    }
    return {"sharded": state, "replicated": ramp((4, 3), salt=20), "plain": ramp((6,), salt=21), "epoch": 5}
