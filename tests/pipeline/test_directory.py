"""What lies in the directory: names, order of publishing, and what the sweep may and may not take."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, CorruptCheckpointError
from dcp_async.storage.local.storage import LocalStorage
from dcp_async.storage.local.transaction import LocalTransaction
from tests.support.doubles import (
    DATA_FILE,
    MANIFEST,
    PATIENCE,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    data_files,
    leftovers,
    manifest_of,
    random_tensor,
)
from tests.support.saves import STATE

UID = "0123456789abcdef"


async def save(engine: CheckpointEngine, **options: Any) -> Path:
    info = await (await engine.save(STATE, **options)).upload_completion
    return Path(info.checkpoint_id)


async def test_a_checkpoint_is_three_kinds_of_files_of_one_uid(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        directory = root / await save(engine, step=100)
    names = sorted(os.listdir(directory))
    data = [DATA_FILE.match(name) for name in names if name.endswith(".distcp")]
    manifests = [MANIFEST.match(name) for name in names if name.endswith(".json")]
    assert directory.name == "step-00000100"
    assert len(names) == len(data) + 2
    assert ".metadata" in names
    assert len({match["uid"] for match in [*data, *manifests] if match}) == 1
    assert any(name.startswith("__0_0-") for name in names)


async def test_the_metadata_names_the_manifest(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        directory = root / await save(engine)
        (info,) = [info async for info in engine.checkpoints()]
        meta = (await info.metadata()).storage_meta
    assert meta is not None
    assert (directory / (meta.save_id or "")).is_file()
    assert meta.save_id == f"manifest-{manifest_of(directory)['uid']}.json"


async def test_two_saves_have_two_uids(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        one = data_files(root / await save(engine, step=1))
        two = data_files(root / await save(engine, step=2))
    assert {file.name for file in one}.isdisjoint(file.name for file in two)


async def test_data_files_are_padded_to_pages(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for file in data_files(root / await save(engine)):
            assert file.stat().st_size % 4096 == 0


async def test_the_manifest_is_json_and_says_what_it_is(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        directory = root / await save(engine, step=5, notes={"loss": 0.25})
    manifest = manifest_of(directory)
    assert manifest["step"] == 5
    assert manifest["notes"] == {"loss": 0.25}
    assert "version" in manifest
    text = json.dumps(manifest)
    for file in data_files(directory):
        assert file.name in text
        assert str(file.stat().st_size) in text


async def test_the_metadata_holds_stock_classes_only(root: Path) -> None:
    import pickle
    import pickletools

    from torch.distributed.checkpoint.metadata import Metadata

    async with CheckpointEngine(root) as engine:
        directory = root / await save(engine)
    content = (directory / ".metadata").read_bytes()
    assert isinstance(pickle.loads(content), Metadata)
    strings = {str(argument) for _, argument, _ in pickletools.genops(content) if argument is not None}
    assert not any("dcp_async" in string for string in strings)


async def test_nothing_is_visible_before_the_commit(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine, CheckpointEngine(root) as other:
        with faulty.hold("commit") as gate:
            response = await engine.save(STATE, step=1)
            await gate.until_arrived()
            assert not (root / "step-00000001" / ".metadata").exists()
            assert await other.latest() is None  # the engine itself would wait for its save
            assert any(name.startswith(".lease-") for name in os.listdir(root / "step-00000001"))
        await response.upload_completion
        assert await other.latest() is not None
    assert_holds_only(root, ["step-00000001"])


async def test_payloads_are_aligned(root: Path) -> None:
    """On 64 bytes, from 1 MiB on 4 KiB: the raw bytes are found where that leaves them."""
    small = random_tensor(torch.uint8, (999,), 1)
    large = random_tensor(torch.uint8, ((1 << 20) + 5,), 2)
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save({"a": small, "b": large, "n": 3})).upload_completion
    (file,) = data_files(root / info.checkpoint_id)
    content = file.read_bytes()
    assert content.find(small.numpy().tobytes()) % 64 == 0
    assert content.find(large.numpy().tobytes()) % 4096 == 0


async def test_no_checkpoint_contains_what_was_in_the_buffers_before(root: Path) -> None:
    """A pool's buffer is used again; gaps and padding must not leak a former state into the file."""
    secret = torch.full((3_000_000,), 0xA5, dtype=torch.uint8)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"s": secret}, step=1)).upload_completion
        state = {f"t{i}": torch.zeros(i * 331) for i in range(40)} | {"n": "x" * 100}
        info = await (await engine.save(state, step=2)).upload_completion
    (file,) = data_files(root / info.checkpoint_id)
    assert b"\xa5" * 8 not in file.read_bytes()


# --- the sweep ------------------------------------------------------------------------------------


def plant(directory: Path, uid: str = UID, *, lease: bool = True) -> list[Path]:
    """What a writer that died leaves behind."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"__0_0-{uid}.distcp", f"manifest-{uid}.json", f".metadata-{uid}.tmp"]
    names += [f".lease-{uid}"] if lease else []
    for name in names:
        (directory / name).write_bytes(b"leftover")
    return [directory / name for name in names]


@pytest.mark.parametrize("lease", [True, False])
async def test_the_files_of_a_dead_save_are_swept(root: Path, lease: bool) -> None:
    plant(root / "step-00000003", lease=lease)
    async with CheckpointEngine(root) as engine:
        await save(engine, step=9)
    assert_holds_only(root, ["step-00000009"])


async def test_the_files_of_a_dead_replace_are_swept_and_the_checkpoint_stays(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await save(engine, step=1)
        plant(root / "step-00000001")
        assert_same(await engine.read(1), STATE)
        await save(engine, step=2)
        assert_same(await engine.read(1), STATE)
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def test_a_dead_save_takes_nothing_of_a_checkpoint_of_no_bytes(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"a": {}}, step=1, notes={"loss": 0.25})).upload_completion
        plant(root / "step-00000001")
        await save(engine, step=2)
        assert leftovers(root) == []
        (info,) = [info async for info in engine.checkpoints() if info.step == 1]
        assert (info.producer, info.notes) == ("dcp_async", {"loss": 0.25})
        assert await engine.read(1) == {"a": {}}


async def test_of_two_saves_of_no_bytes_the_manifest_of_the_published_one_counts(root: Path) -> None:
    """The other one's is what a replace leaves that was killed right before or behind its rename."""
    manifests: dict[str, bytes] = {}
    async with CheckpointEngine(root) as engine:
        for number in range(3):
            saving = await engine.save({}, checkpoint_id="x", notes={"number": number}, replace=True)
            await saving.upload_completion
            (manifest,) = (root / "x").glob("manifest-*")
            manifests[manifest.name] = manifest.read_bytes()
        for name, content in manifests.items():
            (root / "x" / name).write_bytes(content)
        (info,) = [info async for info in engine.checkpoints()]
        assert info.notes == {"number": 2}


async def test_a_checkpoint_of_no_bytes_without_its_manifest_is_damaged(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"a": {}}, step=1)).upload_completion
        (manifest,) = (root / "step-00000001").glob("manifest-*")
        manifest.unlink()
        with pytest.raises(CorruptCheckpointError, match="there is no manifest"):
            await engine.read(1)


async def test_the_files_of_a_living_save_are_left_alone(root: Path) -> None:
    planted = plant(root / "step-00000003")
    with open(root / "step-00000003" / f".lease-{UID}", "r+b") as lease:
        fcntl.flock(lease, fcntl.LOCK_EX)
        async with CheckpointEngine(root) as engine:
            await save(engine, step=9)
        assert all(path.exists() for path in planted)
    async with CheckpointEngine(root) as engine:
        await save(engine, step=10)
    assert_holds_only(root, ["step-00000009", "step-00000010"])


async def test_nothing_foreign_is_swept(root: Path) -> None:
    plant(root / "step-00000003")
    foreign = [
        root / "step-00000003" / "notes.txt",
        root / "step-00000003" / "__0_0.distcp",
        root / "step-00000003" / "__0_0-0123456789ABCDEF.distcp",
        root / "step-00000003" / "__0_0-0123456789abcde.distcp",
        root / "step-00000003" / "manifest.json",
        root / "step-00000003" / ".metadata.tmp",
        root / "stock" / "__0_0.distcp",
        root / f"__0_0-{UID}.distcp",
        root / "deep" / "er" / f"__0_0-{UID}.distcp",
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"precious")
    (root / "empty").mkdir()
    async with CheckpointEngine(root) as engine:
        await save(engine, step=9)
    assert [path for path in foreign if not path.exists()] == []
    assert not (root / "step-00000003" / f"__0_0-{UID}.distcp").exists()
    assert (root / "empty").is_dir()


async def test_an_unreadable_metadata_protects_its_directory(root: Path) -> None:
    planted = plant(root / "step-00000003")
    (root / "step-00000003" / ".metadata").write_bytes(b"garbage")
    async with CheckpointEngine(root) as engine:
        await save(engine, step=9)
    assert all(path.exists() for path in planted if not path.name.startswith(".lease"))


async def test_sweeping_is_repeated_before_each_save(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for step in range(3):
            plant(root / f"step-{step + 50:08d}")
            await save(engine, step=step)
            assert leftovers(root) == []


async def test_reading_sweeps_nothing(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await save(engine, step=1)
    planted = plant(root / "step-00000003")
    async with CheckpointEngine(root) as engine:
        await engine.read()
        await engine.latest()
    assert all(path.exists() for path in planted)


async def test_a_checkpoint_that_was_moved_as_a_directory_still_loads(root: Path, tmp_path: Path) -> None:
    async with CheckpointEngine(root) as engine:
        name = await save(engine, step=1)
    other = tmp_path / "other"
    other.mkdir()
    os.rename(root / name, other / "renamed")
    async with CheckpointEngine(other) as engine:
        assert_same(await engine.read("renamed"), STATE)
        latest = await engine.latest()
        assert latest is not None
        assert (latest.checkpoint_id, latest.step) == ("renamed", 1)


async def test_a_relative_root_stays_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root)
    async with CheckpointEngine("run") as engine:
        await save(engine, step=1)
        monkeypatch.chdir(root / "elsewhere")
        await save(engine, step=2)
        assert_same(await engine.read(1), STATE)
    assert_holds_only(root / "run", ["step-00000001", "step-00000002"])


async def test_a_rank_that_is_led_waits_on_when_the_leading_one_fails_right_then(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not blame itself for a directory that went away under it."""
    real = LocalTransaction.begin.__func__  # type: ignore[attr-defined]
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()

    def begin(cls: Any, storage: Any, directory: Path, files: Any, *rest: Any) -> Any:
        if files and not gone.is_set():
            shutil.rmtree(directory)
            loop.call_soon_threadsafe(gone.set)
        return real(cls, storage, directory, files, *rest)

    storage = LocalStorage(root)
    await storage.connect()
    failed = await storage.begin("x", {}, uid=UID, replace=False)
    monkeypatch.setattr(LocalTransaction, "begin", classmethod(begin))
    led = asyncio.create_task(storage.begin("x", {"a": 9}, uid=UID, replace=False, led_from="here"))
    await asyncio.wait_for(gone.wait(), PATIENCE)
    lead = await storage.begin("x", {}, uid=UID, replace=False)
    mine = await asyncio.wait_for(led, PATIENCE)
    for transaction in (mine, lead, failed):
        await transaction.abort()
    await storage.close()


async def test_names_without_a_step_are_in_the_order_of_their_digits(root: Path) -> None:
    """Whatever copied them has changed their times."""
    names = ["checkpoint-7", "checkpoint-10", "checkpoint-100"]
    async with CheckpointEngine(root) as engine:
        for number in (2, 0, 1):
            await (await engine.save({"number": number}, checkpoint_id=names[number])).upload_completion
        for age, name in enumerate(reversed(names)):
            os.utime(root / name / ".metadata", (1000 + age, 1000 + age))
        (root / "last").symlink_to("checkpoint-7")
        assert [info.checkpoint_id async for info in engine.checkpoints()] == names
        latest = await engine.latest()
        assert latest is not None
        assert (latest.checkpoint_id, latest.step) == ("checkpoint-100", None)
        assert await engine.read() == {"number": 2}
        assert await engine.read("last") == {"number": 0}
        await (await engine.save({"number": 3}, checkpoint_id="final")).upload_completion
        assert await engine.read() == {"number": 3}
