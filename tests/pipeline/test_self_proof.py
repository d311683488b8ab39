"""A save proves itself: what would not be read back is not published, and the error says what differs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_async import (
    CheckpointEngine,
    EngineStateError,
    PlanningOptions,
    SaveError,
)
from dcp_async.engine import release
from dcp_async.formats import distcp, zip_item
from dcp_async.formats import metadata_writer as metadata
from dcp_async.formats.manifest import FileEntry, structure_json
from dcp_async.planning import global_plan as publication
from dcp_async.planning import self_proof as proof
from dcp_async.save import publishing
from tests.support.doubles import assert_same, data_files

STATE: dict[str, Any] = {
    "m": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)},
    "epoch": 3,
    "sparse": torch.eye(3).to_sparse(),
    "groups": [{"lr": 0.5, "buffer": torch.zeros(2)}],
}

# --- encoders gone wrong, as a newer torch or a bug of ours would make them


def _wrong_place(patch: pytest.MonkeyPatch) -> None:
    encoded = metadata._Numbers.__missing__

    def missing(self: Any, value: int | None) -> bytes:
        return encoded(self, 4096 if value is not None and value > 4096 else value)

    patch.setattr(metadata._Numbers, "__missing__", missing)


def _other_dtype(patch: pytest.MonkeyPatch) -> None:
    reduce = metadata._PICKLED_AS[TensorProperties]

    def reduced(properties: TensorProperties) -> Any:
        make, args, state = reduce(properties)
        return make, args, (torch.float64, *state[1:])

    patch.setitem(metadata._PICKLED_AS, TensorProperties, reduced)


def _other_class(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(metadata._PICKLED_AS, TensorProperties, lambda properties: (os.getpid, ()))


def _four_fields(patch: pytest.MonkeyPatch) -> None:
    usual: Any = TensorProperties.__getstate__
    patch.setattr(TensorProperties, "__getstate__", lambda self: usual(self)[:4])


def _renamed_field(patch: pytest.MonkeyPatch) -> None:
    usual = metadata._entry

    def entry(constants: Any, each: Any) -> bytes:
        return usual(constants, each).replace(b"properties", b"qualities!")

    patch.setattr(metadata, "_entry", entry)
    encode = metadata._Constants._encoded
    patch.setattr(
        metadata._Constants,
        "_encoded",
        lambda self, value: encode(self, "qualities!" if value == "properties" else value),
    )


def _other_size(patch: pytest.MonkeyPatch) -> None:
    usual = publication._Entries.tensor

    def tensor(self: Any, kind: Any, size: Any, boxes: Any) -> Any:
        return usual(self, kind, (*size[:-1], size[-1] + 1) if size else size, boxes)

    patch.setattr(publication._Entries, "tensor", tensor)


def _other_chunk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        publication._Entries,
        "_make_chunk",
        lambda self, offsets, shape: ChunkStorageMetadata(torch.Size(offsets), torch.Size([1] * len(shape))),
    )


def _lost_leaf_of_the_tree(patch: pytest.MonkeyPatch) -> None:
    def without(tree: Any, strides: Any, exotic: Any) -> str:
        return structure_json(
            ["dict", {key: node for key, node in tree[1].items() if key != "epoch"}], strides, exotic
        )

    patch.setattr(publication, "structure_json", without)


def _forgotten_rooms(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        publication, "structure_json", lambda tree, strides, exotic: structure_json(tree, strides, ())
    )


def _short_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        publishing, "FileEntry", lambda name, nbytes, digest: FileEntry(name=name, nbytes=100, digest=digest)
    )


def _item_of_another_layout(patch: pytest.MonkeyPatch) -> None:
    usual = zip_item.tensor_frame

    def frame(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
        head, tail = usual(dtype, shape)
        return head.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"), tail

    for module in (proof, distcp):
        patch.setattr(module, "tensor_frame", frame)


WRONG: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "a place": (_wrong_place, r"lies in .*, not in"),
    "a dtype": (_other_dtype, r"m\.b is torch\.float64|m\.w is torch\.float64|float64"),
    "a class": (_other_class, r"names posix\.getpid"),
    "too few fields": (_four_fields, "can't be read .*make no sense"),
    "the name of a field": (_renamed_field, "can't be read .*properties"),
    "a size": (_other_size, r"is torch\.\w+ \(.*not torch"),
    "a chunk": (_other_chunk, r"in chunks .* not torch"),
    "the tree": (_lost_leaf_of_the_tree, "another structure"),
    "the list of rooms": (_forgotten_rooms, "tensors in rooms"),
    "the length of a file": (_short_file, "items of rank 0 end at"),
    "an item": (_item_of_another_layout, r"an item of torch\.\w+"),
}


@pytest.fixture(autouse=True)
def _nothing_proven_yet() -> Iterator[None]:
    proof.prove_item.cache_clear()
    yield
    proof.prove_item.cache_clear()


@pytest.mark.parametrize(("break_it", "differs"), WRONG.values(), ids=WRONG)
async def test_what_does_not_read_back_is_not_published(
    root: Path, break_it: Callable[[pytest.MonkeyPatch], None], differs: str
) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.MonkeyPatch.context() as patch:
            break_it(patch)
            response = await engine.save(STATE, step=1)
            with pytest.raises(SaveError, match=differs) as caught:
                await response.upload_completion
        assert "Nothing was published" in str(caught.value)
        assert caught.value.phase == "commit"
        assert await engine.latest() is None
        assert not data_files(root / "step-00000001")
        assert not list(root.glob("*/.metadata"))
        proof.prove_item.cache_clear()
        await (await engine.save(STATE, step=2)).upload_completion
        assert_same(await engine.read(2), STATE)


async def test_a_replaced_checkpoint_stays_where_its_successor_does_not_read_back(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
    async with CheckpointEngine(root) as engine:
        with pytest.MonkeyPatch.context() as patch:
            _other_dtype(patch)
            with pytest.raises(SaveError, match="does not read back"):
                await (await engine.save(STATE, step=1, replace=True)).upload_completion
        assert_same(await engine.read(1), STATE)


# --- planners of the user's that say what is not so


class Lying(DefaultSavePlanner):
    """Says of ``m.w`` what ``change`` makes of it."""

    def __init__(self, change: Callable[[TensorStorageMetadata, Metadata], None]) -> None:
        super().__init__()
        self._change = change

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, made = super().create_global_plan(all_plans)
        entry = made.state_dict_metadata["m.w"]
        assert isinstance(entry, TensorStorageMetadata)
        self._change(entry, made)
        return plans, made


def _no_chunk(entry: TensorStorageMetadata, _: Metadata) -> None:
    entry.chunks = []


def _smaller_chunk(entry: TensorStorageMetadata, _: Metadata) -> None:
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 3]))]


def _chunk_twice(entry: TensorStorageMetadata, _: Metadata) -> None:
    entry.chunks = entry.chunks * 2


def _other_entry(entry: TensorStorageMetadata, made: Metadata) -> None:
    made.state_dict_metadata["m.w"] = made.state_dict_metadata["m.b"]


def _size(entry: TensorStorageMetadata, _: Metadata) -> None:
    entry.size = torch.Size([4, 3])


def _dtype(entry: TensorStorageMetadata, _: Metadata) -> None:
    entry.properties = TensorProperties(dtype=torch.int32)


LIES = {
    "no chunk": _no_chunk,
    "a smaller chunk": _smaller_chunk,
    "a chunk twice": _chunk_twice,
    "another tensor's entry": _other_entry,
    "another size": _size,
    "another dtype": _dtype,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_planner_that_says_what_is_not_so_fails_the_save_by_name(
    root: Path, lie: Callable[[TensorStorageMetadata, Metadata], None]
) -> None:
    planning = PlanningOptions(save=lambda: Lying(lie))
    async with CheckpointEngine(root, planning=planning) as engine:
        with pytest.raises(SaveError, match=r"m\.[wb]"):
            await (await engine.save(STATE, step=1)).upload_completion
        assert await engine.latest() is None


async def test_an_honest_planner_of_the_users_saves(root: Path) -> None:
    planning = PlanningOptions(save=lambda: Lying(lambda entry, made: None))
    async with CheckpointEngine(root, planning=planning) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        assert_same(await engine.read(1), STATE)


# --- how often


async def test_the_proof_runs_once_for_each_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def counted(*args: Any) -> Any:
        runs.append(1)
        return proof.prove(*args)

    monkeypatch.setattr(publication, "prove", counted)
    state = dict(STATE)
    async with CheckpointEngine(root) as engine:
        for step in range(4):
            await (await engine.save(state, step=step)).upload_completion
        assert len(runs) == 1
        state["more"] = torch.ones(3)
        for step in range(4, 7):
            await (await engine.save(state, step=step)).upload_completion
    assert len(runs) == 2


# --- a torch that nobody could test with

VERSIONS = {
    "2.11.0": False,
    "2.13.0": False,
    "2.14.1+cu132": False,
    "2.15.0+cpu": False,
    "2.15.3": False,
    "2.15.0a0+gitabc": False,
    "2.16.0": True,
    "2.16.0a0": True,
    "2.16.0.dev20270101+cpu": True,
    "2.100.0": True,
    "3.0.0": True,
    "unknown": True,
}


@pytest.fixture
def _unseen() -> Iterator[None]:
    release._check_newer.cache_clear()
    yield
    release._check_newer.cache_clear()


@pytest.mark.usefixtures("_unseen")
@pytest.mark.parametrize(("version", "newer"), VERSIONS.items())
async def test_an_unknown_newer_torch_is_said_once_and_the_engine_works(
    root: Path, version: str, newer: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    for step in range(2):
        async with CheckpointEngine(root) as engine:
            await (await engine.save(STATE, step=step)).upload_completion
            assert_same(await engine.read(step), STATE)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == newer
    assert all("torch 2.11 to 2.15" in text and version in text for text in said)


@pytest.mark.usefixtures("_unseen")
@pytest.mark.parametrize("name", ["a dtype", "a class", "too few fields", "a size", "the tree", "an item"])
async def test_a_newer_torch_that_does_not_read_back_is_refused_at_open(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.16.0")
    engine = CheckpointEngine(root)
    with pytest.MonkeyPatch.context() as patch:
        WRONG[name][0](patch)
        with pytest.raises(EngineStateError, match=r"torch<2\.16.*newer dcp_async"):
            await engine.open()
    assert not root.exists() or not list(root.iterdir())
    proof.prove_item.cache_clear()
    async with CheckpointEngine(root) as engine:  # nothing of the failure stays
        await (await engine.save(STATE, step=0)).upload_completion


def test_the_tested_range_begins_at_the_floor_of_the_requirements() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'"torch>={release.OLDEST[0]}.{release.OLDEST[1]},<3"' in text
