"""One tensor of each kind that torch knows, all of one shape, to be replaced by each other between saves.

Each takes the place of each other in a process of its own, which a wrong answer may end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from dcp_async.state import CaptureError
from dcp_async.state.capture import Captured, KnownStructure, capture
from tests.property.states import Marked

SHAPE = (4, 4)


def _plain() -> torch.Tensor:
    return torch.arange(16.0).reshape(SHAPE)


def _nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(4, 3)], layout=layout)


def _quantized() -> torch.Tensor:
    return torch._make_per_tensor_quantized_tensor(torch.ones(SHAPE, dtype=torch.int8), 0.5, 3)


def _freed() -> torch.Tensor:
    tensor = _plain()
    tensor.untyped_storage().resize_(0)
    return tensor


def _cut_short() -> torch.Tensor:
    tensor = _plain()
    tensor.untyped_storage().resize_(60)
    return tensor


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return _plain()


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(SHAPE)


def _in_vmap() -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append(row)
        return row

    torch.func.vmap(look)(torch.ones(2, *SHAPE))
    return seen[0]


def _complex() -> torch.Tensor:
    return torch.complex(_plain(), _plain())


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": _plain,
    "nested, strided": lambda: _nested(torch.strided),
    "nested, jagged": lambda: _nested(torch.jagged),
    "COO": lambda: torch.eye(4).to_sparse(),
    "CSR": lambda: torch.eye(4).to_sparse_csr(),
    "BSR": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "quantized": _quantized,
    "meta": lambda: torch.empty(SHAPE, device="meta"),
    "subclass": lambda: _plain().as_subclass(Marked),
    "Parameter": lambda: nn.Parameter(_plain()),
    "Buffer": lambda: nn.Buffer(_plain()),
    "requires grad": lambda: _plain().requires_grad_(),
    "conjugated": lambda: _complex().conj(),
    "negated": lambda: _complex().conj().imag,
    "complex32": lambda: torch.zeros(SHAPE, dtype=torch.complex32),
    "float8": lambda: torch.zeros(SHAPE, dtype=torch.float8_e4m3fn),
    "int": lambda: torch.ones(SHAPE, dtype=torch.int32),
    "expanded": lambda: torch.ones(4, 1).expand(SHAPE),
    "transposed": lambda: _plain().t(),
    "without elements": lambda: torch.empty(0, 4),
    "freed storage": _freed,
    "storage cut short": _cut_short,
    "inference": _inference,
    "fake": _fake,
    "in a vmap": _in_vmap,
    "mkldnn": lambda: _plain().to_mkldnn(),
    "lazy": lambda: nn.parameter.UninitializedParameter(),
    "lazy buffer": lambda: nn.parameter.UninitializedBuffer(),
}


def _captured(tensor: torch.Tensor, previous: KnownStructure | None) -> Captured | str:
    try:
        return capture({"w": tensor, "step": 1}, previous)
    except CaptureError as error:
        return str(error)


def _agree(found: Captured | str, expected: Captured | str) -> bool:
    if isinstance(found, str) or isinstance(expected, str):
        return found == expected
    same = found.structure == expected.structure and found.leaf_items == expected.leaf_items
    return same and [id(tensor) for tensor in found.tensors] == [id(tensor) for tensor in expected.tensors]


def replace_each_by_each() -> int:
    """How many replacements the cache has seen; before each it is printed, should it end the process."""
    made: dict[str, Any] = {name: make() for name, make in KINDS.items()}
    for first, before in made.items():
        for second, after in made.items():
            sys.stdout.write(f"{first} -> {second}\n")
            sys.stdout.flush()
            start = _captured(before, None)
            previous = None if isinstance(start, str) else start.known
            assert _agree(_captured(after, previous), _captured(after, None))
    return len(made) ** 2
