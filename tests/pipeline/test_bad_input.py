"""Bad input: an error of the tree that says what to do, and nothing is lost."""

from __future__ import annotations

import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    CorruptCheckpointError,
    LoadError,
    SaveError,
    StagingOptions,
    StorageError,
    UntrustedCheckpointError,
)
from dcp_async.sync import CheckpointEngine as CheckpointTwin
from tests.support.doubles import (
    PATIENCE,
    assert_holds_only,
    assert_same,
    committed,
    data_files,
    frozen,
    manifest_file,
    manifest_of,
    random_tensor,
    written_unchecked,
)
from tests.support.saves import SMALL, saved

GOOD: dict[str, Any] = {"w": random_tensor(torch.float32, (30, 40), 1), "n": 1}


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("I do not want to be pickled")


class Moody:
    """A Stateful that fails when it is asked."""

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no state today")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never called")


BAD_STATES: dict[str, tuple[Any, str]] = {
    "lambda": ({"deep": {"er": {"fn": lambda: 0}}, **GOOD}, r"deep\.er\.fn"),
    "lock": ({"deep": {"lock": threading.Lock()}, **GOOD}, r"deep\.lock"),
    "reduce_raises": ({"deep": [{"x": Unpicklable()}], **GOOD}, r"deep\.0\.x"),
    "inside_a_leaf": ({"deep": (1, [lambda: 0]), **GOOD}, r"deep"),
    "two_names": ({"a": {"b": torch.ones(2)}, "a.b": torch.zeros(2), **GOOD}, r"a\.b"),
    "two_leaf_names": ({"a": {"b": 1}, "a.b": 2, **GOOD}, r"a\.b"),
    "int_and_str": ({"d": {0: torch.ones(2), "0": torch.zeros(2)}, **GOOD}, r"d\.0"),
    "meta": ({"m": {"w": torch.empty(3, device="meta")}, **GOOD}, r"m\.w"),
    "state_dict_raises": ({"s": Moody(), **GOOD}, r"\bs\b"),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])
@pytest.mark.parametrize("name", BAD_STATES)
async def test_a_bad_state_is_named_and_the_engine_goes_on(root: Path, name: str, overlap: bool) -> None:
    state, where = BAD_STATES[name]
    async with CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:
        await saved(engine, GOOD, step=1)
        with pytest.raises(SaveError, match=where) as caught:
            await saved(engine, state, step=2)
        assert caught.value.phase in ("capture", "plan")
        assert (caught.value.checkpoint_id, caught.value.step) == ("step-00000002", 2)
        await engine.wait()
        assert_same(await engine.read(), GOOD)
        await saved(engine, GOOD, step=3)
    assert_holds_only(root, ["step-00000001", "step-00000003"])


class Interrupted:
    """A Stateful during whose state_dict() somebody presses Ctrl-C."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyboardInterrupt

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never called")


def test_an_interrupt_inside_state_dict_passes_and_the_engine_goes_on(root: Path) -> None:
    with CheckpointTwin(root) as engine:
        with pytest.raises(KeyboardInterrupt):
            engine.save({"s": Interrupted()}, step=1)
        assert engine.pending == ()
        engine.save(GOOD, step=1).upload_completion.result(PATIENCE)
        assert_same(engine.read(), GOOD)


class Stubborn:
    """A Stateful that does not take back what it gave."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("I will not have it")


async def test_a_stateful_that_refuses_its_state_is_an_error_of_the_tree(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"s": Stubborn()})
        with pytest.raises(LoadError, match="I will not have it"):
            await engine.load({"s": Stubborn()})


async def test_a_bad_state_raises_from_save_itself(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError):
            await engine.save({"fn": lambda: 0})
        assert engine.pending == ()


async def test_a_container_that_holds_itself_is_refused(root: Path) -> None:
    loop: dict[str, Any] = {"w": torch.ones(2)}
    loop["self"] = loop
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointError):
            await saved(engine, {"x": loop}, step=1)
        await saved(engine, GOOD, step=2)
    assert_holds_only(root, ["step-00000002"])


@pytest.mark.parametrize(
    "state", [[1, 2], None, torch.ones(2), {1: torch.ones(2)}], ids=["list", "none", "tensor", "int_key"]
)
async def test_a_state_that_is_no_mapping_of_names_is_refused(root: Path, state: Any) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises((TypeError, ValueError, CheckpointError)):
            await saved(engine, state, step=1)
        await saved(engine, GOOD, step=2)
    assert_holds_only(root, ["step-00000002"])


# --- roots ----------------------------------------------------------------------------------------


async def use(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD)


async def test_a_root_that_is_a_file_is_refused(root: Path) -> None:
    root.write_text("precious")
    with pytest.raises((StorageError, SaveError), match=root.name):
        await use(root)
    assert root.read_text() == "precious"


async def test_a_root_below_a_file_is_refused(root: Path) -> None:
    root.write_text("precious")
    with pytest.raises((StorageError, SaveError), match=root.name):
        await use(root / "below")
    assert root.read_text() == "precious"


async def test_an_unwritable_root_is_refused() -> None:
    with pytest.raises((StorageError, SaveError), match="dcp_async_test"):
        await use(Path("/proc/dcp_async_test/run"))


async def test_a_root_that_vanishes_between_saves_is_made_anew_or_an_error(root: Path) -> None:
    import shutil

    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        shutil.rmtree(root)
        try:
            await saved(engine, GOOD, step=2)
        except SaveError:
            assert not root.exists()
        else:
            assert_same(await engine.read(), GOOD)


async def test_an_occupied_name_is_an_error_and_the_file_stays(root: Path) -> None:
    root.mkdir()
    (root / "step-00000002").write_text("precious")
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CheckpointError, match="step-00000002"):
            await saved(engine, GOOD, step=2)
        await engine.wait()
        await saved(engine, GOOD, step=3)
        assert [info.step async for info in engine.checkpoints()] == [3]
    assert (root / "step-00000002").read_text() == "precious"


# --- what is on the disk --------------------------------------------------------------------------


class Bomb:
    """Runs a shell command where it is unpickled carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


FOREIGN = {
    "text": b"hello, this is no pickle",
    "empty": b"",
    "zeros": bytes(4096),
    "other_pickle": pickle.dumps({"not": "metadata"}),
    "truncated_pickle": pickle.dumps(list(range(1000)))[:500],
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
async def test_a_foreign_metadata_is_a_clear_error(root: Path, content: bytes) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        place = root / "step-00000002"
        place.mkdir()
        (place / ".metadata").write_bytes(content)
        state = {"w": torch.zeros(30, 40), "n": 0}
        with pytest.raises(LoadError, match="step-00000002"):
            await engine.load(state, "step-00000002")
        with pytest.raises(LoadError):
            await engine.read("step-00000002")
        assert_same(state, {"w": torch.zeros(30, 40), "n": 0})
        [info async for info in engine.checkpoints()]
        assert_same(await engine.read("step-00000001"), GOOD)
        await saved(engine, GOOD, step=3)
        assert_same(await engine.read(), GOOD)
    assert (place / ".metadata").read_bytes() == content


async def test_a_metadata_that_names_a_forbidden_global_is_refused_and_not_run(
    root: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "exploded"
    place = root / "step-00000005"
    place.mkdir(parents=True)
    (place / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
    async with CheckpointEngine(root) as engine:
        for source in ("step-00000005", "latest"):
            with pytest.raises(LoadError):
                await engine.load({"n": 0}, source)
            with pytest.raises(LoadError):
                await engine.read(source)
        [info async for info in engine.checkpoints()]
        with pytest.raises(UntrustedCheckpointError, match="system"):
            await engine.load({"n": 0}, "step-00000005")
    assert not mark.exists()


async def test_a_forbidden_global_smuggled_into_our_own_metadata_is_not_run(
    root: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "exploded"
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, GOOD, step=1)
        (root / "step-00000001" / ".metadata").write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(LoadError):
            await engine.load({"n": 0}, 1)
        with pytest.raises(LoadError):
            await engine.read("step-00000001")
        with pytest.raises(CheckpointError):
            await info.metadata()
        await saved(engine, GOOD, step=2)
    assert not mark.exists()


def stock_metadata(relative_path: str, place: Path) -> None:
    """A checkpoint as stock writes it, of a state {"n": 1, "w": ...}, whose files are elsewhere."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    source = place.parent / f"{place.name}-source"
    dcp.save(GOOD, checkpoint_id=source, no_dist=True)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    metadata.storage_data = {
        index: _StorageInfo(relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }
    place.mkdir(parents=True)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.filterwarnings("ignore::UserWarning")  # stock warns that it saves in one process
@pytest.mark.parametrize("kind", ["relative", "absolute", "deep", "symlink"])
async def test_paths_that_leave_the_root_are_refused(root: Path, tmp_path: Path, kind: str) -> None:
    place = root / "evil"
    outside = tmp_path / "outside"
    path = {
        "relative": "../../outside-source/__0_0.distcp",
        "absolute": str(tmp_path / "outside-source" / "__0_0.distcp"),
        "deep": "x/../../../outside-source/__0_0.distcp",
        "symlink": "link/__0_0.distcp",
    }[kind]
    stock_metadata(path, outside)
    place.mkdir(parents=True)
    os.rename(outside / ".metadata", place / ".metadata")
    (place / "x").mkdir()
    if kind == "symlink":
        os.symlink(tmp_path / "outside-source", place / "link")
    async with CheckpointEngine(root) as engine:
        state = {"w": torch.zeros(30, 40), "n": 0}
        with pytest.raises(LoadError):
            await engine.load(state, "evil")
        with pytest.raises(LoadError):
            await engine.read("evil")
    assert_same(state, {"w": torch.zeros(30, 40), "n": 0})


def age(directory: Path) -> Path:
    """Make the manifest one of a format that is yet to come, whole and rightly signed."""
    path = manifest_file(directory)
    version = manifest_of(directory)["version"]
    body, mark, _ = path.read_bytes().rpartition(b',"digest":"')
    newer = re.sub(rb'"version":"?[^",]+"?', b'"version":999', body, count=1)
    assert newer != body, version
    path.write_bytes(newer + mark + xxhash.xxh3_64_hexdigest(newer).encode() + b'"}')
    return path


async def test_a_newer_format_version_is_refused_by_name(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        await saved(engine, GOOD | {"n": 2}, step=2)
        path = age(root / "step-00000002")
        state = {"w": torch.zeros(30, 40), "n": 0}
        with pytest.raises(LoadError, match=r"version.*999|999.*version"):
            await engine.load(state, "step-00000002")
        with pytest.raises(LoadError, match="version"):
            await engine.read("step-00000002")
        assert_same(state, {"w": torch.zeros(30, 40), "n": 0})
        assert_same(await engine.read("step-00000001"), GOOD)
        await saved(engine, GOOD, step=3)
        assert_same(await engine.read(), GOOD)
    assert path.exists()


async def test_latest_does_not_silently_pass_over_a_newer_format(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        await saved(engine, GOOD | {"n": 2}, step=2)
        age(root / "step-00000002")
        with pytest.raises(LoadError, match="version"):
            await engine.load({"w": torch.zeros(30, 40), "n": 0})
        with pytest.raises(LoadError, match="version"):
            await engine.latest()
        with pytest.raises(LoadError, match="version"):
            assert [info async for info in engine.checkpoints()]


# --- data files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "short_by_one", "short", "empty", "long", "directory"])
async def test_a_data_file_of_the_wrong_size_is_corrupt_and_no_target_is_touched(
    root: Path, damage: str
) -> None:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, GOOD, step=1)
        await saved(engine, GOOD, step=2)
        (file,) = data_files(root / "step-00000002")
        size = file.stat().st_size
        if damage in ("missing", "directory"):
            file.unlink()
        if damage == "directory":
            file.mkdir()
        if damage in ("short_by_one", "short", "empty", "long"):
            os.truncate(
                file, {"short_by_one": size - 1, "short": size // 2, "empty": 0, "long": size + 4096}[damage]
            )
        state = {"w": torch.zeros(30, 40), "n": 0}
        with pytest.raises(CorruptCheckpointError, match="step-00000002") as caught:
            await engine.load(state, 2)
        assert file.name in str(caught.value)
        assert not caught.value.partially_loaded
        assert_same(state, {"w": torch.zeros(30, 40), "n": 0})
        report = await engine.load(state)
        assert report.step == 1
        assert_same(state, GOOD)


async def test_the_manifest_of_another_save_does_not_pass(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        await saved(engine, GOOD | {"n": 2}, step=2)
        one, two = root / "step-00000001", root / "step-00000002"
        (two / ".metadata").write_bytes((one / ".metadata").read_bytes())
        with pytest.raises(LoadError):
            await engine.read("step-00000002")
        assert_same(await engine.read("step-00000001"), GOOD)


async def test_data_files_exchanged_between_saves_are_noticed(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in (1, 2):
            await saved(engine, {"w": GOOD["w"] * step, "n": 1}, step=step)
        (one,), (two,) = data_files(root / "step-00000001"), data_files(root / "step-00000002")
        assert one.stat().st_size == two.stat().st_size
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
        for step in (1, 2):
            with pytest.raises(CorruptCheckpointError):
                await engine.read(step)


async def test_a_failed_load_of_leaves_touches_no_tensor(root: Path) -> None:
    """The leaf's class is forbidden: that is known before the first target is touched."""
    await written_unchecked(root, {"w": GOOD["w"], "leaf": Harmless(3)})
    async with CheckpointEngine(root) as engine:
        state: dict[str, Any] = {"w": torch.zeros(30, 40), "leaf": None}
        before = frozen(state)
        with pytest.raises(UntrustedCheckpointError, match="Harmless"):
            await engine.load(state)
    assert_same(state, before)


class Harmless:
    def __init__(self, value: int) -> None:
        self.value = value


async def test_errors_name_the_checkpoint_and_are_of_the_tree(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, GOOD, step=1)
        (root / "step-00000001" / ".metadata").unlink()
        with pytest.raises(CheckpointError, match="step-00000001"):
            await engine.load({"n": 0}, "step-00000001")
        with pytest.raises(CheckpointError, match=r"\b1\b"):
            await engine.load({"n": 0}, 1)
        assert committed(root) == []
