"""Whatever options stock's writers and planners were given, the engine reads what they wrote."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemWriter,
    StorageWriter,
    _extension,
    _version,
)
from torch.distributed.checkpoint._extension import StreamTransformExtension, ZStandard
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from tests.support.saves import SMALL

try:
    from torch.distributed.checkpoint.fsspec_filesystem import (  # type: ignore[import-not-found, unused-ignore]
        FsspecWriter,
    )
except ImportError:  # its home until torch 2.14
    from torch.distributed.checkpoint._fsspec_filesystem import (  # type: ignore[assignment, unused-ignore]
        FsspecWriter,
    )

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    Trust,
    UntrustedCheckpointError,
)
from tests.interop.stock_states import as_stock_returns, leaf_state, nested_state, strided_state
from tests.support.doubles import DTYPES, SHAPES, TrainingRun, assert_same, blank, flip, random_tensor

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]


Writer = Callable[[Path], StorageWriter]
WRITERS: dict[str, Writer] = {
    "default": FileSystemWriter,
    "threads": lambda path: FileSystemWriter(path, thread_count=2),
    "more_threads_than_items": lambda path: FileSystemWriter(path, thread_count=40),
    "file_per_item": lambda path: FileSystemWriter(path, single_file_per_rank=False),
    "file_per_item_by_threads": lambda path: FileSystemWriter(
        path, single_file_per_rank=False, thread_count=3
    ),
    "unsynced": lambda path: FileSystemWriter(path, sync_files=False),
    "no_overwrite": lambda path: FileSystemWriter(path, overwrite=False),
    "copy_ahead": lambda path: FileSystemWriter(path, per_thread_copy_ahead=1),
    "cached_staging": lambda path: FileSystemWriter(path, cache_staged_state_dict=True),
    "zstd": lambda path: FileSystemWriter(path, _extensions=[ZStandard()]),
    "zstd_twice_by_threads": lambda path: FileSystemWriter(
        path, thread_count=2, _extensions=[ZStandard(), ZStandard()]
    ),
    "fsspec": lambda path: FsspecWriter(f"file://{path}", sync_files=False),
    "fsspec_zstd": lambda path: FsspecWriter(f"file://{path}", sync_files=False, _extensions=[ZStandard()]),
}
STATES = {"nested": nested_state, "strided": strided_state, "leaves": leaf_state}


def stock_save(path: Path, state: Any, writer: Writer = FileSystemWriter, planner: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=writer(path), planner=planner, no_dist=True)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("writer", WRITERS)
async def test_a_writer_with_options(root: Path, writer: str, state: str) -> None:
    stock_save(root / "s", STATES[state](), WRITERS[writer])
    target = blank(STATES[state]())
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.load(target, "s")
        assert_same(target, STATES[state]())
        assert_same(await engine.read("s"), as_stock_returns(STATES[state]()))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_every_bit_of_a_dtype_through_zstd(root: Path, dtype: torch.dtype) -> None:
    saved = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
    stock_save(root / "s", saved, WRITERS["zstd"])
    target = blank(saved)
    async with CheckpointEngine(root) as engine:
        await engine.load(target, "s")
        assert_same(target, saved)
        assert_same(await engine.read("s"), saved)


async def test_strides_of_stock_come_back_row_major(root: Path) -> None:
    """`.metadata` does not hold them, and one chunk's say nothing of the whole; stock does the same."""
    stock_save(root / "s", strided_state())
    async with CheckpointEngine(root) as engine:
        for tensor in (await engine.read("s")).values():
            assert tensor.is_contiguous()


async def test_an_overwritten_checkpoint_is_the_last_one(root: Path) -> None:
    stock_save(root / "s", {f"t{i}": torch.ones(100) for i in range(9)}, WRITERS["file_per_item"])
    stock_save(root / "s", nested_state())
    assert len(list((root / "s").glob("*.distcp"))) == 9
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), as_stock_returns(nested_state()))


# --- extensions


@pytest.fixture
def _without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it is where neither package is installed."""
    monkeypatch.setattr(_extension, "zstandard", None)
    monkeypatch.setattr(_extension, "pyzstd", None)


async def _assert_is_not_readable(root: Path, match: str) -> None:
    """For a reason that is no damage: an older checkpoint is not taken instead, and nothing is touched."""
    stock_save(root / "step-00000001", {"a": torch.ones(3), "w": torch.ones(300)})
    target = {"a": torch.zeros(3), "w": torch.zeros(300)}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(LoadError, match=match) as caught:
            await engine.load(target)
        assert not isinstance(caught.value, CorruptCheckpointError)
        assert caught.value.checkpoint_id == "step-00000002"
        with pytest.raises(LoadError, match=match):
            await engine.read()
    assert_same(target, {"a": torch.zeros(3), "w": torch.zeros(300)})


async def test_a_missing_package_is_named(root: Path, request: pytest.FixtureRequest) -> None:
    stock_save(root / "step-00000002", {"a": torch.ones(3), "w": torch.ones(300)}, WRITERS["zstd"])
    request.getfixturevalue("_without_zstd")
    await _assert_is_not_readable(root, "install zstandard")


class Reversed(StreamTransformExtension):
    """An extension of somebody else's, which torch's registry does not know."""

    @staticmethod
    def registry_name() -> str:
        return "stream.reversed"

    @staticmethod
    def from_descriptor(version: str) -> Reversed:
        return Reversed()

    def get_descriptor(self) -> str:
        return "stream.reversed/7"

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, input: Any) -> Any:
        return input


async def test_an_unknown_extension_is_named(root: Path) -> None:
    state = {"a": torch.ones(3), "w": torch.ones(300)}
    stock_save(root / "step-00000002", state, lambda path: FileSystemWriter(path, _extensions=[Reversed()]))
    await _assert_is_not_readable(root, "stream.reversed/7")


async def test_an_unknown_version_of_an_extension_is_named(root: Path) -> None:
    class Newer(ZStandard):
        def get_descriptor(self) -> str:
            return "stream.zstd/2"

    state = {"a": torch.ones(3), "w": torch.ones(300)}
    stock_save(root / "step-00000002", state, lambda path: FileSystemWriter(path, _extensions=[Newer()]))
    await _assert_is_not_readable(root, "stream.zstd/2")


async def test_what_needs_no_extension_is_read_without(root: Path) -> None:
    stock_save(root / "s", {"a": torch.ones(3), "w": torch.ones(300)})
    _edit(root / "s", lambda metadata: _describe(metadata, "w", ["stream.unheard_of"]))
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s", keys=["a"]), {"a": torch.ones(3)})
        with pytest.raises(LoadError, match="unheard_of"):
            await engine.read("s")


def _describe(metadata: Metadata, name: str, descriptors: Any) -> None:
    for index, place in metadata.storage_data.items():
        if index.fqn == name:
            place.transform_descriptors = descriptors


@pytest.mark.parametrize("descriptors", ["stream.zstd/1", [3], 4], ids=repr)
async def test_descriptors_that_are_none_are_damage(root: Path, descriptors: Any) -> None:
    stock_save(root / "s", {"w": torch.ones(300)})
    _edit(root / "s", lambda metadata: _describe(metadata, "w", descriptors))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match="w"):
            await engine.read("s")


@pytest.mark.parametrize("name", ["w", "leaf"])
async def test_a_stream_that_was_cut_is_named(root: Path, name: str) -> None:
    stock_save(root / "s", {"leaf": "x" * 999, "w": torch.ones(300)}, WRITERS["zstd"])

    def shorten(metadata: Metadata) -> None:
        for index, place in metadata.storage_data.items():
            place.length -= 20 if index.fqn == name else 0

    _edit(root / "s", shorten)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=name) as caught:
            await engine.read("s")
    assert caught.value.tensors == (name,)


@pytest.mark.parametrize("name", ["w", "leaf"])
async def test_a_byte_that_changed_in_a_stream_never_changes_a_value(root: Path, name: str) -> None:
    """zstd holds no checksum by itself, but the zip inside does; bytes between its records may change."""
    state = {"leaf": "x" * 999, "w": random_tensor(torch.float32, (300,), 1)}
    stock_save(root / "s", state, WRITERS["zstd"])
    (place,) = (at for index, at in _metadata(root / "s").storage_data.items() if index.fqn == name)
    noticed = 0
    async with CheckpointEngine(root) as engine:
        for position in range(place.offset, place.offset + place.length, 29):
            flip(root / "s" / "__0_0.distcp", position)
            found = await _read_or_damage(engine)
            if isinstance(found, CorruptCheckpointError):
                assert found.tensors == (name,)
                noticed += 1
            else:
                assert_same(found, state)
            flip(root / "s" / "__0_0.distcp", position)
    assert noticed > 5


async def _read_or_damage(engine: CheckpointEngine) -> dict[str, Any] | CorruptCheckpointError:
    try:
        return await engine.read("s")
    except CorruptCheckpointError as error:
        return error


async def test_a_tensor_that_inflates_beyond_its_shape_is_refused(root: Path) -> None:
    """Some kilobytes of zstd may hold gigabytes; what dtype and shape need is known before."""
    import zstandard

    stock_save(root / "s", {"w": torch.ones(300)}, WRITERS["zstd"])
    bomb = zstandard.compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    (root / "s" / "__0_0.distcp").write_bytes(bomb)

    def lengthen(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.length = len(bomb)

    _edit(root / "s", lengthen)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match="inflates to more") as caught:
            await engine.read("s")
    assert caught.value.tensors == ("w",)


# --- formats and planners


async def test_the_safetensors_format_is_refused_by_name(root: Path) -> None:

    state = {"a": torch.ones(3), "w": torch.ones(300)}
    stock_save(
        root / "step-00000002",
        state,
        lambda path: FileSystemWriter(path, serialization_format=SerializationFormat.SAFETENSORS),
    )
    await _assert_is_not_readable(root, "SAFETENSORS")


async def test_a_directory_of_hugging_faces_writer_is_refused_by_name(root: Path) -> None:

    stock_save(root / "hf", {"w": torch.ones(300)}, lambda path: HuggingFaceStorageWriter(str(path)))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointNotFoundError, match=r"open_checkpoint\(path\)"):
            await engine.read("hf")
        with pytest.raises(CheckpointNotFoundError, match="there is none yet"):
            await engine.read()


async def test_a_planner_that_does_not_flatten(root: Path) -> None:
    """Every container is one leaf then, with its tensors inside."""
    stock_save(root / "s", nested_state(), planner=DefaultSavePlanner(flatten_state_dict=False))
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), as_stock_returns(nested_state()))


@pytest.fixture
def _flattened_as_by_torch_2_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 2.3, containers without a tensor in them were leaves; torch keeps that way to read them."""
    monkeypatch.setattr(_version, "_derived_version", "2_3")


@pytest.mark.usefixtures("_flattened_as_by_torch_2_3")
async def test_leaves_that_older_torch_did_not_flatten(root: Path) -> None:
    stock_save(root / "s", nested_state())
    assert "optim.param_groups" in _metadata(root / "s").state_dict_metadata
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), as_stock_returns(nested_state()))
        lists = await engine.read("s", keys=["optim.param_groups", "note"])
        assert lists == {
            "optim": {"param_groups": nested_state()["optim"]["param_groups"]},
            "note": ["x", {"y": 1.5}],
        }


@pytest.mark.usefixtures("_flattened_as_by_torch_2_3")
async def test_a_training_run_that_older_torch_did_not_flatten_is_loaded(root: Path) -> None:
    """As stock does, which tries the older names where the newer ones are missing."""
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(2)
    stock_save(root / "s", run.state)
    async with CheckpointEngine(root) as engine:
        await engine.load(other.state, "s")
    assert_same(other.picture(), run.picture())


async def test_a_training_run_that_was_not_flattened_at_all_is_loaded(root: Path) -> None:
    """Its optimizer took no step yet: the state of one that did is taken as it was saved."""
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(2)
    stock_save(root / "s", run.state, planner=DefaultSavePlanner(flatten_state_dict=False))
    target = other.state | {"epoch": 1}
    async with CheckpointEngine(root) as engine:
        report = await engine.load(target, "s", strict=False)
        assert report.missing == ("epoch",)
    assert_same(other.picture(), run.picture())


@pytest.mark.usefixtures("_flattened_as_by_torch_2_3")
async def test_a_class_inside_of_an_unflattened_leaf_is_refused_before_anything_is_touched(
    root: Path,
) -> None:
    stock_save(root / "s", {"w": torch.ones(3), "c": {"d": Foreign()}})
    target = {"w": torch.zeros(3), "c": {"d": None}}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match="Foreign"):
            await engine.load(target, "s")
    assert_same(target, {"w": torch.zeros(3), "c": {"d": None}})


class Foreign:
    """A planner's own notes."""


class NotingPlanner(DefaultSavePlanner):
    def __init__(self, notes: Any) -> None:
        super().__init__()
        self.notes = notes

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.planner_data = self.notes(metadata.planner_data)
        return plans, metadata


PLANNER_DATA: dict[str, Callable[[Any], Any]] = {
    "none": lambda paths: None,
    "text": lambda paths: "mine",
    "numbers": lambda paths: dict.fromkeys(paths, 3),
    "empty_paths": lambda paths: dict.fromkeys(paths, ()),
    "other_paths": lambda paths: {name: ("elsewhere", name) for name in paths},
    "endless_list": lambda paths: {name: (name, 10**15) for name in paths},
    "floats": lambda paths: {name: (*path[:-1], 1.5) for name, path in paths.items()},
    "foreign": lambda paths: {"mine": Foreign()},
    "foreign_beside_paths": lambda paths: {**paths, "mine": Foreign()},
    "foreign_class": lambda paths: Foreign,
}


@pytest.mark.parametrize("kind", PLANNER_DATA)
async def test_planner_data_of_somebody_else_does_no_harm(root: Path, kind: str) -> None:
    """Names stay whole then; nothing of a foreign class is imported."""
    saved = {"m": {"w": torch.ones(4), "l": [torch.zeros(2), torch.ones(2)]}, "n": 3}
    stock_save(root / "s", saved, planner=NotingPlanner(PLANNER_DATA[kind]))
    target = blank(saved)
    async with CheckpointEngine(root) as engine:
        await engine.load(target, "s")
        assert_same(target, saved)
        flat = {"m.w": torch.ones(4), "m.l.0": torch.zeros(2), "m.l.1": torch.ones(2), "n": 3}
        assert_same(await engine.read("s"), flat)
        latest = await engine.latest()
        assert latest is not None
        assert set((await latest.metadata()).state_dict_metadata) == set(flat)


async def test_a_name_below_a_leaf_stays_whole(root: Path) -> None:
    """Names of custom planners may be prefixes of one another."""
    stock_save(root / "s", {"a": {"b": torch.ones(2)}, "c": 1})

    def rename(metadata: Metadata) -> None:
        metadata.planner_data = {"a.b": ("a", "b"), "a": ("a",)}
        metadata.state_dict_metadata["a"] = metadata.state_dict_metadata.pop("c")
        for index in list(metadata.storage_data):
            if index.fqn == "c":
                metadata.storage_data[type(index)("a")] = metadata.storage_data.pop(index)

    _edit(root / "s", rename)
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read("s"), {"a": 1, "a.b": torch.ones(2)})


# --- paths


def _metadata(directory: Path) -> Metadata:
    metadata: Metadata = pickle.loads((directory / ".metadata").read_bytes())
    return metadata


def _edit(directory: Path, change: Callable[[Metadata], object]) -> None:
    metadata = _metadata(directory)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _move(directory: Path, path: str) -> None:
    def change(metadata: Metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = path

    _edit(directory, change)


@pytest.fixture
def elsewhere(root: Path, tmp_path: Path) -> Path:
    """A checkpoint whose data lies in another directory of the root, and a copy outside of the root."""
    stock_save(root / "s", {"w": torch.ones(300)})
    (root / "base").mkdir()
    shutil.copy(root / "s" / "__0_0.distcp", tmp_path / "outside.distcp")
    (root / "s" / "__0_0.distcp").rename(root / "base" / "data.distcp")
    return root


@pytest.mark.parametrize("path", ["../base/data.distcp", "{root}/base/data.distcp"])
async def test_data_elsewhere_below_the_root_is_read(elsewhere: Path, path: str) -> None:
    _move(elsewhere / "s", path.format(root=elsewhere))
    async with CheckpointEngine(elsewhere) as engine:
        assert_same(await engine.read("s"), {"w": torch.ones(300)})


@pytest.mark.parametrize("trust", [Trust(), Trust(unsafe=True)], ids=["safe", "unsafe"])
@pytest.mark.parametrize("path", ["../../outside.distcp", "{root}/../outside.distcp"])
async def test_data_outside_of_the_root_is_refused(elsewhere: Path, path: str, trust: Trust) -> None:
    _move(elsewhere / "s", path.format(root=elsewhere))
    async with CheckpointEngine(elsewhere, trust=trust) as engine:
        with pytest.raises(CorruptCheckpointError, match="leaves the root"):
            await engine.read("s")
