"""Leaves that are taken apart: which, how deep, and under what names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from dcp_async.formats.stock_compat import folded, take_apart


@pytest.mark.parametrize(
    ("leaves", "wanted", "expected"),
    [
        (["a", "b"], {"a.x", "c"}, ["a"]),
        (["a.b", "a"], {"a.b.c.d"}, ["a.b", "a"]),
        (["a"], {"a"}, []),
        (["a"], {"a", "a.b"}, []),
        (["a"], {"ab.c"}, []),
        (["ab"], {"a.b"}, []),
        ([], {"a.b"}, []),
        (["a"], set(), []),
    ],
)
def test_leaves_above_wanted_names_are_folded(
    leaves: list[str], wanted: set[str], expected: list[str]
) -> None:
    assert folded(leaves, wanted) == expected


def apart(value: Any, wanted: set[str]) -> dict[str, tuple[Any, Any]]:
    return {name: (part.path, part.value) for name, part in take_apart(value, "x", ("x",), wanted)}


def test_mappings_and_lists_are_taken_apart_and_nothing_else() -> None:
    value = {"a": {3: 1, "b": (1, [2])}, "l": [{"c": None}, "text"], "e": {}, "f": []}
    assert apart(value, set()) == {
        "x.a.3": (("x", "a", "3"), 1),
        "x.a.b": (("x", "a", "b"), (1, [2])),
        "x.l.0.c": (("x", "l", 0, "c"), None),
        "x.l.1": (("x", "l", 1), "text"),
    }


def test_what_a_state_has_as_a_leaf_stays_whole() -> None:
    value = {"params": [0, 1], "lr": 0.1}
    assert apart(value, {"x.params", "x.lr"}) == {
        "x.params": (("x", "params"), [0, 1]),
        "x.lr": (("x", "lr"), 0.1),
    }


def test_parts_are_described_as_metadata_would() -> None:
    parts = dict(take_apart({"t": torch.ones(2, 3, dtype=torch.int16), "n": 1}, "x", ("x",), set()))
    meta = parts["x.t"].meta
    assert isinstance(meta, TensorStorageMetadata)
    assert (tuple(meta.size), meta.properties.dtype, meta.chunks) == ((2, 3), torch.int16, [])
    assert isinstance(parts["x.n"].meta, BytesStorageMetadata)
