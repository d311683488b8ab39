"""Tensors whose storage was freed and made anew, smaller, at the address where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dcp_async import SaveError
from dcp_async.state.capture_cache import CaptureCache
from dcp_async.state.tensor_memory import SpotCheck
from dcp_async.sync import CheckpointEngine

KIB = 1024


class Odd(dict[str, torch.Tensor]):
    """A mapping that no cache knows, so that each save flattens it anew."""


def made_smaller(tensor: torch.Tensor) -> bool:
    """Whether its storage lies where it was, and is too small."""
    before, storage = tensor.data_ptr(), tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes - 64)
    return tensor.data_ptr() == before


@pytest.mark.parametrize("mapping", [dict, Odd])
@pytest.mark.parametrize("nbytes", [4 * KIB, 64 * KIB, 2 * KIB * KIB])
def test_a_storage_that_was_made_smaller_is_never_saved(
    tmp_path: Path, nbytes: int, mapping: type[dict[str, torch.Tensor]]
) -> None:
    with CheckpointEngine(tmp_path) as engine:
        for attempt in range(20):
            state = mapping(tensor=torch.ones(nbytes, dtype=torch.uint8), other=torch.ones(10))
            for step in (2 * attempt, 2 * attempt + 1):  # the second follows the first
                engine.save({"m": state}, step=step)
                engine.wait()
            if made_smaller(state["tensor"]):
                with pytest.raises(SaveError, match=r"m\.tensor: its storage holds \d+ bytes"):
                    engine.save({"m": state}, step=1000)
                return
    pytest.skip("the allocator gave other memory each time")


@pytest.mark.parametrize("count", [1, 128, 129, 1000])
@pytest.mark.parametrize("nbytes", [0, 100])
def test_small_tensors_are_looked_at_in_turn(count: int, nbytes: int) -> None:
    tensors = [torch.ones(64) for _ in range(count)]
    check = SpotCheck([tensor.nbytes for tensor in tensors])
    assert all(check.is_in_bounds(tensors) for _ in range(2 * count // 128 + 2))
    tensors[-1].untyped_storage().resize_(nbytes)
    assert not all(check.is_in_bounds(tensors) for _ in range(count // 128 + 2))


def test_large_tensors_are_looked_at_each_time() -> None:
    tensors = [torch.ones(64) for _ in range(1000)] + [torch.ones(1 << 18)]
    check = SpotCheck([tensor.nbytes for tensor in tensors])
    tensors[-1].untyped_storage().resize_(64)
    assert not any(check.is_in_bounds(tensors) for _ in range(3))


def test_tensors_without_elements_do_not_have_all_others_looked_at() -> None:
    tensors = [torch.ones(64) for _ in range(1000)] + [torch.ones(0), torch.ones(0, 3)]
    cache = CaptureCache()
    cache.in_bounds = addresses = [tensor.data_ptr() for tensor in tensors]
    assert 0 in addresses
    assert cache.is_in_bounds(tensors, addresses)
    assert not cache.is_in_bounds(tensors, [0, *addresses[1:]])
    tensors[3].untyped_storage().resize_(0)
    cache.in_bounds = addresses = [tensor.data_ptr() for tensor in tensors]
    assert not cache.is_in_bounds(tensors, addresses)
