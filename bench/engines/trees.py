"""Nested states as plain dicts and as named tensors, for engines that know no module and no optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state with modules and optimizers taken apart, for engines that would pickle them whole."""
    return {
        key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in state.items()
    }


def named_tensors(node: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors below `node` under dotted names."""
    if isinstance(node, torch.Tensor):
        yield prefix, node
    elif isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in items:
            yield from named_tensors(child, f"{prefix}.{key}" if prefix else str(key))


def copy_into(state: Any, loaded: Any) -> None:
    """Copy what was loaded into the tensors that a model would have, as `load_state_dict` does."""
    sources = dict(named_tensors(loaded))
    for name, tensor in named_tensors(state):
        tensor.copy_(sources[name])
