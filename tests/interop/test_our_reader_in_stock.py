"""Stock's load calls with our reader in them: ours and stock's files, verified, trusted, and in part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from dcp_async import CorruptCheckpointError, Trust, UntrustedCheckpointError
from dcp_async.interop import FileSystemReader, FileSystemWriter
from tests.interop.stock_states import leaf_state, nested_state, strided_state
from tests.support.doubles import assert_same, blank, data_files, flip

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

WRITERS: dict[str, Callable[[Path], Any]] = {
    "ours": FileSystemWriter,
    "stock": dcp.FileSystemWriter,
    "stock, a file per item": lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False),
}


class Custom:
    """A leaf that no trust knows."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom)


def load(target: dict[str, Any], path: Path, reader: FileSystemReader | None = None, **options: Any) -> None:
    dcp.load(target, storage_reader=reader or FileSystemReader(path), no_dist=True, **options)


def saved(path: Path, writer: str = "ours") -> dict[str, Any]:
    state = {"a": torch.arange(40_000.0).reshape(200, 200), "b": {"c": torch.ones(7), "n": 5}}
    dcp.save(state, storage_writer=WRITERS[writer](path), no_dist=True)
    return state


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("make", [nested_state, strided_state, leaf_state])
def test_stock_loads_through_our_reader(
    tmp_path: Path, make: Callable[[], dict[str, Any]], writer: str
) -> None:
    state = make()
    dcp.save(state, storage_writer=WRITERS[writer](tmp_path / "a"), no_dist=True)
    target = blank(state)
    load(target, tmp_path / "a")
    assert_same(target, state)


def test_targets_of_other_dtypes_and_strides_are_filled_as_stock_fills_them(tmp_path: Path) -> None:
    state = saved(tmp_path / "a")
    target: dict[str, Any] = {
        "a": torch.zeros(200, 200, dtype=torch.float64).t(),
        "b": {"c": torch.zeros(14)[::2], "n": 0},
    }
    load(target, tmp_path / "a")
    assert torch.equal(target["a"], state["a"].double())
    assert torch.equal(target["b"]["c"], state["b"]["c"])
    parameter = torch.nn.Parameter(torch.zeros(200, 200))
    load({"a": parameter}, tmp_path / "a", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(parameter, state["a"])


def test_a_part_of_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    state = saved(tmp_path / "a")
    target = {"b": {"c": torch.zeros(7)}}
    load(target, tmp_path / "a")
    assert torch.equal(target["b"]["c"], state["b"]["c"])
    more: dict[str, Any] = {"b": {"c": torch.zeros(7)}, "new": torch.full((3,), 2.0)}
    load(more, tmp_path / "a", planner=DefaultLoadPlanner(allow_partial_load=True))
    assert torch.equal(more["new"], torch.full((3,), 2.0))


def test_a_state_is_made_from_what_our_metadata_tells(tmp_path: Path) -> None:
    state = saved(tmp_path / "a")
    made: dict[str, Any] = {}
    _load_state_dict(
        made,
        storage_reader=FileSystemReader(tmp_path / "a"),
        planner=_EmptyStateDictLoadPlanner(),  # type: ignore[no-untyped-call]
        no_dist=True,
    )
    assert_same(made, state)


def test_one_reader_serves_many_loads(tmp_path: Path) -> None:
    reader = FileSystemReader(tmp_path / "none")
    for name in ("one", "two"):
        state = saved(tmp_path / name)
        for _ in range(2):
            target = blank(state)
            dcp.load(target, checkpoint_id=tmp_path / name, storage_reader=reader, no_dist=True)
            assert_same(target, state)


def test_metadata_is_read_without_a_load(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    reader = FileSystemReader(tmp_path / "a")
    assert set(reader.read_metadata().state_dict_metadata) == {"a", "b.c", "b.n"}
    reader.reset()  # lets go of its files


class CountingPlanner(DefaultLoadPlanner):
    """Hands out copies, as for a device, and takes them back."""

    def __init__(self) -> None:
        super().__init__()
        self.committed: list[str] = []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor.clone()

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)
        self.committed.append(read_item.dest_index.fqn)


def test_a_planner_takes_each_tensor_once_it_is_verified(tmp_path: Path) -> None:
    state = saved(tmp_path / "a")
    target, planner = blank(state), CountingPlanner()
    load(target, tmp_path / "a", planner=planner)
    assert sorted(planner.committed) == ["a", "b.c"]
    assert_same(target, state)


# --- what is refused


def test_a_bad_block_fails_the_load(tmp_path: Path) -> None:
    state = saved(tmp_path / "a")
    (file,) = data_files(tmp_path / "a")
    flip(file, 100_000)
    target = blank(state)
    with pytest.raises(CheckpointException, match="do not match their checksum") as caught:
        load(target, tmp_path / "a")
    cause = caught.value.failures[0][0]
    assert isinstance(cause, CorruptCheckpointError)
    assert cause.partially_loaded
    assert "a" in cause.tensors
    assert target["b"]["n"] is None
    stock = blank(state)  # which loads the flipped bit
    dcp.load(stock, checkpoint_id=tmp_path / "a", no_dist=True)
    assert not torch.equal(stock["a"], state["a"])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_was_cut_off_is_refused_before_anything_is_loaded(tmp_path: Path, writer: str) -> None:
    state = saved(tmp_path / "a", writer)
    target = blank(state)
    file = max((tmp_path / "a").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 5000)
    with pytest.raises(CheckpointException, match="it was cut off"):
        load(target, tmp_path / "a")
    assert_same(target, blank(state))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_leaf_that_trust_does_not_admit_is_refused_before_anything_is_loaded(
    tmp_path: Path, writer: str
) -> None:
    state = {"a": torch.zeros(3), "b": {"c": torch.zeros(3), "n": Custom()}}
    dcp.save(state, storage_writer=WRITERS[writer](tmp_path / "a"), no_dist=True)
    target = blank(state)
    with pytest.raises(CheckpointException) as caught:
        load(target, tmp_path / "a")
    assert isinstance(caught.value.failures[0][0], UntrustedCheckpointError)
    assert_same(target, blank(state))
    for trust in (Trust(safe_globals=(Custom,)), Trust(unsafe=True)):
        load(target, tmp_path / "a", FileSystemReader(tmp_path / "a", trust=trust))
        assert_same(target["a"], state["a"])
        assert isinstance(target["b"]["n"], Custom)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="checkpoint 'a' is not committed"):
        load({"x": torch.ones(1)}, tmp_path / "a")


def test_what_has_no_meaning_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="_extension_registry"):
        FileSystemReader(tmp_path, object())
    with pytest.raises(ValueError, match="is an address"):
        FileSystemReader("s3://bucket/a")


def test_where_it_can_read_is_said_by_the_reader(tmp_path: Path) -> None:
    assert FileSystemReader.validate_checkpoint_id(tmp_path)
    assert not FileSystemReader.validate_checkpoint_id(tmp_path / "none")
    assert not FileSystemReader.validate_checkpoint_id("s3://bucket/a")


def test_calls_in_another_order_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="was not called from this thread"):
        FileSystemReader(tmp_path).read_data(None, None)  # type: ignore[arg-type]
