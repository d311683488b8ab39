"""What stock writes but never checks: CRC-32s are compared, and trust is decided before a target changes."""

from __future__ import annotations

import functools
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard

from dcp_async import (
    CheckpointEngine,
    CorruptCheckpointError,
    Trust,
    UntrustedCheckpointError,
)
from tests.interop.stock_states import as_stock_returns, nested_state
from tests.support.doubles import assert_same, blank, flip, random_tensor, raw_bytes
from tests.support.saves import SMALL

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]


def stock_save(path: Path, state: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(path, sync_files=False, **options)
    dcp.save(state, storage_writer=writer, no_dist=True)


def place_of(directory: Path, name: str) -> tuple[Path, int, int]:
    """(file, offset, length) of an item."""
    storage_data = pickle.loads((directory / ".metadata").read_bytes()).storage_data
    (place,) = (place for index, place in storage_data.items() if index.fqn == name)
    return directory / place.relative_path, place.offset, place.length


def flip_inside(directory: Path, name: str, content: bytes) -> None:
    """Flip the bit in the middle of ``content``, which an item holds as it is."""
    file, offset, length = place_of(directory, name)
    at = file.read_bytes()[offset : offset + length].index(content)
    flip(file, offset + at + len(content) // 2)


# --- CRC-32


@pytest.mark.parametrize("nbytes", [40, 400_000])
@pytest.mark.parametrize("way", ["load", "atomic", "read"])
async def test_a_flipped_byte_of_a_tensor_is_named(root: Path, nbytes: int, way: str) -> None:
    state = {name: random_tensor(torch.uint8, (nbytes,), salt) for salt, name in enumerate("abc")}
    stock_save(root / "s", state)
    flip_inside(root / "s", "b", raw_bytes(state["b"]))
    target = blank(state)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        reading = engine.read("s") if way == "read" else engine.load(target, "s", atomic=way == "atomic")
        with pytest.raises(CorruptCheckpointError, match=r"b in __0_0\.distcp.*data/0.*CRC-32") as caught:
            await reading
    assert caught.value.tensors == ("b",)
    assert caught.value.partially_loaded == (way == "load")
    if way != "load":
        assert_same(target, blank(state))


async def test_a_flipped_byte_of_a_leaf_is_named_before_anything_is_touched(root: Path) -> None:
    stock_save(root / "s", {"leaf": "x" * 5000, "w": torch.ones(9)})
    flip_inside(root / "s", "leaf", b"x" * 5000)
    target = {"leaf": None, "w": torch.zeros(9)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=r"leaf in .*data\.pkl") as caught:
            await engine.load(target, "s")
    assert caught.value.tensors == ("leaf",)
    assert not caught.value.partially_loaded
    assert_same(target, {"leaf": None, "w": torch.zeros(9)})


async def test_latest_falls_back_over_a_flipped_byte(root: Path) -> None:
    older, newer = (random_tensor(torch.uint8, (999,), step) for step in (1, 2))
    stock_save(root / "step-00000001", {"w": older})
    stock_save(root / "step-00000002", {"w": newer})
    flip_inside(root / "step-00000002", "w", raw_bytes(newer))
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read(), {"w": older})


@pytest.fixture
def _no_crcs() -> Iterator[None]:
    """Stock's own option for faster saves: every CRC-32 is 0."""
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("_no_crcs")
async def test_checkpoints_without_crcs_are_read(root: Path) -> None:
    stock_save(root / "s", nested_state())
    file, offset, length = place_of(root / "s", "model.weight")
    item = file.with_name("item.zip")
    item.write_bytes(file.read_bytes()[offset : offset + length])
    with zipfile.ZipFile(item) as archive:
        assert archive.getinfo("archive/data/0").CRC == 0
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), as_stock_returns(nested_state()))


async def test_no_flipped_byte_changes_a_value(root: Path) -> None:
    """Padding between the records may change; whatever is read is what was written."""
    state = {"w": random_tensor(torch.float32, (20,), 1), "leaf": [1, {"x": "y"}]}
    stock_save(root / "s", state)
    (file,) = (root / "s").glob("*.distcp")
    noticed = 0
    async with CheckpointEngine(root) as engine:
        for position in range(0, file.stat().st_size, 11):
            flip(file, position)
            try:
                result: Any = await engine.read("s")
            except (CorruptCheckpointError, UntrustedCheckpointError):
                noticed += 1
            else:
                assert_same(result, state)
            flip(file, position)
    assert noticed > 60


# --- items in torch's format before 1.6


@pytest.fixture
def _legacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "save", functools.partial(torch.save, _use_new_zipfile_serialization=False))


@pytest.mark.usefixtures("_legacy")
@pytest.mark.parametrize("trust", [Trust(), Trust(unsafe=True)], ids=["safe", "unsafe"])
async def test_legacy_items_are_read(root: Path, trust: Trust) -> None:
    stock_save(root / "s", nested_state())
    file, offset, _ = place_of(root / "s", "model.weight")
    assert file.read_bytes()[offset : offset + 2] != b"PK"
    target = blank(nested_state())
    async with CheckpointEngine(root, trust=trust, staging=SMALL) as engine:
        await engine.load(target, "s")
        assert_same(target, nested_state())
        assert_same(await engine.read("s"), as_stock_returns(nested_state()))


class Mine:
    def __init__(self) -> None:
        self.value = 3


@pytest.mark.usefixtures("_legacy")
async def test_a_class_in_a_legacy_item_is_refused_and_what_helps_is_said(root: Path) -> None:
    stock_save(root / "s", {"leaf": Mine(), "w": torch.ones(3)})
    target = {"leaf": None, "w": torch.zeros(3)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match=r"Mine; nothing was loaded") as caught:
            await engine.load(target, "s")
        assert "Trust(safe_globals=(Mine,))" in str(caught.value)
        assert_same(await engine.read("s", keys=["w"]), {"w": torch.ones(3)})
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Mine,))) as engine:
        assert (await engine.read("s"))["leaf"].value == 3
    async with CheckpointEngine(root, trust=Trust(unsafe=True)) as engine:
        assert (await engine.read("s"))["leaf"].value == 3
    assert_same(target, {"leaf": None, "w": torch.zeros(3)})


@pytest.mark.usefixtures("_legacy")
@pytest.mark.parametrize("cut", [3, 20, 200])
async def test_a_legacy_item_that_was_cut_is_damage(root: Path, cut: int) -> None:
    stock_save(root / "s", {"w": torch.ones(3)})
    metadata = pickle.loads((root / "s" / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.length = min(cut, place.length - 1)
    (root / "s" / ".metadata").write_bytes(pickle.dumps(metadata))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load({"w": torch.zeros(3)}, "s")
    assert caught.value.tensors == ("w",)
    assert not caught.value.partially_loaded


# --- trust, before anything is touched


class Tagged(torch.Tensor):
    """A tensor whose item names its class, and holds what it was tagged with."""

    tag: Any


def tagged(numel: int, tag: Any = None) -> torch.Tensor:
    tensor = torch.ones(numel).as_subclass(Tagged)
    tensor.tag = tag
    return tensor


@pytest.mark.parametrize("numel", [3, 100_000])
@pytest.mark.parametrize("options", [{}, {"_extensions": [ZStandard()]}], ids=["plain", "zstd"])
async def test_a_tensor_of_an_unknown_class_is_refused_before_anything_is_touched(
    root: Path, numel: int, options: dict[str, Any]
) -> None:
    state = {f"t{i}": random_tensor(torch.float32, (50_000,), i) for i in range(4)}
    stock_save(root / "s", {**state, "z": tagged(numel)}, **options)
    target = {**blank(state), "z": torch.zeros(numel)}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        with pytest.raises(UntrustedCheckpointError, match="Tagged") as caught:
            await engine.load(target, "s")
        assert "nothing was loaded" in str(caught.value)
        assert_same(target, {**blank(state), "z": torch.zeros(numel)})
        with pytest.raises(UntrustedCheckpointError, match="Tagged"):
            await engine.read("s")
    async with CheckpointEngine(root, staging=SMALL, trust=Trust(safe_globals=(Tagged,))) as engine:
        await engine.load(target, "s")
    assert_same(target, {**state, "z": torch.ones(numel)})


def _rewrite(directory: Path, name: str, value: Any) -> None:
    """Put ``torch.save(value)`` in the place of an item, into a file of its own."""
    torch.save(value, directory / "extra.distcp")
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.relative_path, place.offset = "extra.distcp", 0
            place.length = (directory / "extra.distcp").stat().st_size
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("padding", [0, 100, 5000])
@pytest.mark.parametrize("trust", [Trust(), Trust(safe_globals=(Tagged,))], ids=["default", "class_allowed"])
async def test_what_hides_deep_in_a_tensors_pickle_is_found_in_time(
    root: Path, tmp_path: Path, padding: int, trust: Trust
) -> None:
    """Behind more bytes than a head has, all of the item is decoded beforehand."""
    stock_save(root / "s", {"a": torch.ones(30), "z": torch.ones(30)})
    _rewrite(root / "s", "z", tagged(30, ["x" * padding, Bomb(tmp_path / "exploded")]))
    target = {"a": torch.zeros(30), "z": torch.zeros(30)}
    async with CheckpointEngine(root, trust=trust) as engine:
        with pytest.raises(UntrustedCheckpointError):
            await engine.load(target, "s")
    assert_same(target, {"a": torch.zeros(30), "z": torch.zeros(30)})
    assert not (tmp_path / "exploded").exists()


async def test_an_item_that_holds_another_tensor_is_damage(root: Path) -> None:
    stock_save(root / "s", {"a": torch.ones(30), "z": torch.ones(30)})
    _rewrite(root / "s", "z", torch.ones(31))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.read("s")
    assert caught.value.tensors == ("z",)


async def test_a_torchscript_archive_is_refused_before_anything_is_touched(root: Path) -> None:
    stock_save(root / "s", {"a": torch.ones(30), "z": torch.ones(30)})
    with torch.serialization._open_zipfile_writer(str(root / "s" / "extra.distcp")) as writer:
        for name in ("data.pkl", "constants.pkl"):
            writer.write_record(name, b"x", 1)
    metadata = pickle.loads((root / "s" / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        if index.fqn == "z":
            place.relative_path, place.offset = "extra.distcp", 0
            place.length = (root / "s" / "extra.distcp").stat().st_size
    (root / "s" / ".metadata").write_bytes(pickle.dumps(metadata))
    target = {"a": torch.zeros(30), "z": torch.zeros(30)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match="TorchScript"):
            await engine.load(target, "s")
    assert_same(target, {"a": torch.zeros(30), "z": torch.zeros(30)})


async def test_items_as_long_as_their_elements_are_no_safetensors_if_ours(root: Path) -> None:
    """What is padded to a slot may have any length, and a sparse tensor's dense size says nothing."""
    saved = {f"s{size}": torch.eye(size).to_sparse() for size in (32, 64)}
    saved |= {f"h{size}": torch.ones(size, dtype=torch.complex32) for size in (1024, 2048)}
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save(saved)).upload_completion
        places = (await info.metadata()).storage_data
        assert 32 * 32 * 4 in {place.length for place in places.values()}
        target = {
            name: torch.zeros(value.shape).to_sparse() if value.is_sparse else torch.zeros_like(value)
            for name, value in saved.items()
        }
        await engine.load(target)
        assert_same(target, saved)
        assert_same(await engine.read(), saved)
