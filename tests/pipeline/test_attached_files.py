"""Small files are committed with a checkpoint: whole, checksummed, found by their names; others' stay."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

import dcp_async
import dcp_async.sync
from dcp_async import CheckpointEngine, CorruptCheckpointError, LoadError, SaveError
from dcp_async.formats import SafetensorsFormat
from dcp_async.storage import LocalStorage
from tests.support.doubles import assert_holds_only, faulty_storage, flip, manifest_file, manifest_of

STATE = {"w": torch.arange(6.0), "epoch": 3}
FILES = {"config.json": b'{"layers": 2}', "tokenizer.model": bytes(range(256)) * 20, "empty": b""}


async def saved(engine: CheckpointEngine, files: Mapping[str, Any] | None, **options: Any) -> Path:
    response = await engine.save(STATE, files=files, **{"step": 1, **options})
    info = await response.upload_completion
    root = Path(str(getattr(engine, "_life").setup.storage.root))  # noqa: B009
    return root / info.checkpoint_id


def beside(path: Path) -> dict[str, bytes]:
    """What other programs see: no file of ours."""
    return {
        entry.name: entry.read_bytes()
        for entry in path.iterdir()
        if not entry.name.startswith((".", "__", "manifest-"))
    }


def hidden(path: Path, name: str) -> Path:
    """The checkpoint's own file of what was attached as ``name``."""
    (file,) = path.glob(f".attached-*-{name}")
    return file


async def test_files_are_read_back_by_name_and_lie_there_under_it(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, FILES)
        latest = await engine.latest()
        async with engine.checkpoint() as checkpoint:
            assert dict(checkpoint.files) == {name: len(content) for name, content in FILES.items()}
            assert {name: await checkpoint.file(name) for name in checkpoint.files} == FILES
    assert latest is not None
    assert latest.files == {name: len(content) for name, content in FILES.items()}
    assert (latest.num_files, latest.nbytes) == (1, next(path.glob("*.distcp")).stat().st_size)
    assert beside(path) == FILES
    target: dict[str, Any] = {"w": torch.zeros(6), "epoch": 0}
    dcp.load(target, checkpoint_id=path, no_dist=True)
    assert (target["w"].tolist(), target["epoch"]) == ([0, 1, 2, 3, 4, 5], 3)


def test_the_blocking_twin_does_the_same(root: Path) -> None:
    with dcp_async.sync.CheckpointEngine(root) as engine:
        info = engine.save(STATE, step=1, files=FILES).upload_completion.result()
        with engine.checkpoint() as checkpoint:
            assert checkpoint.file("config.json") == FILES["config.json"]
    assert info.files == {name: len(content) for name, content in FILES.items()}
    with dcp_async.sync.open_checkpoint(root / "step-00000001") as checkpoint:
        assert {name: checkpoint.file(name) for name in checkpoint.files} == FILES


async def test_paths_and_buffers_are_read_before_save_returns(root: Path, tmp_path: Path) -> None:
    source, buffer = tmp_path / "source.json", bytearray(b"before")
    source.write_bytes(b"before")
    (tmp_path / "link").symlink_to(source)
    files: dict[str, Any] = {
        "path": source,
        "text": str(source),
        "link": tmp_path / "link",
        "view": memoryview(buffer),
    }
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=1, files=files)
        source.write_bytes(b"after!")
        buffer[:] = b"after!"
        await response.upload_completion
        async with engine.checkpoint() as checkpoint:
            assert {await checkpoint.file(name) for name in files} == {b"before"}


async def test_a_replaced_checkpoint_has_the_new_files_alone(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, {"config.json": b"old", "gone": b"old", "same": b"same"})
        await saved(engine, {"config.json": b"new", "same": b"same"}, replace=True)
        assert beside(path) == {"config.json": b"new", "same": b"same"}
        async with engine.checkpoint() as checkpoint:
            assert await checkpoint.file("config.json") == b"new"
        await saved(engine, None, replace=True)
        assert beside(path) == {}
        async with engine.checkpoint() as checkpoint:
            assert checkpoint.files == {}
    assert_holds_only(root, ["step-00000001"])


async def test_an_opened_checkpoint_keeps_its_files_though_it_is_replaced(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"config.json": b"old"})
        async with engine.checkpoint() as checkpoint:
            await saved(engine, {"config.json": b"new"}, replace=True)
            assert await checkpoint.file("config.json") == b"old"


async def test_a_save_that_fails_leaves_the_earlier_files(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, {"config.json": b"old"})
    async with faulty_storage(root) as faulty, CheckpointEngine(faulty) as engine:
        faulty.fail("commit", OSError("broken"))
        response = await engine.save(STATE, step=1, files=FILES, replace=True)
        with pytest.raises(SaveError, match="broken"):
            await response.upload_completion
        assert beside(path) == {"config.json": b"old"}
        assert len(list(path.glob(".attached-*"))) == 1


async def test_what_others_put_there_stays_and_is_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, {"config.json": b"ours", "LICENSE": b"free"})
        assert (await engine.verify()).foreign == ()
        (path / "config.json").write_bytes(b"theirs")
        (path / "notes.txt").write_bytes(b"theirs")
        (path / "export").mkdir()
        report = await engine.verify()
        assert report.ok
        assert report.foreign == ("config.json", "export", "notes.txt")
        async with engine.checkpoint() as checkpoint:
            assert await checkpoint.file("config.json") == b"ours"
        await saved(engine, {"config.json": b"ours again", "export": b"", "LICENSE": b"freer"}, replace=True)
        assert "config.json is no file of this checkpoint" in caplog.text
        report = await engine.verify()
        assert report.foreign == ("config.json", "export", "notes.txt")
    (path / "export").rmdir()
    assert beside(path) == {"config.json": b"theirs", "notes.txt": b"theirs", "LICENSE": b"freer"}


async def test_foreign_files_of_a_stock_checkpoint_are_told(root: Path) -> None:
    dcp.save(dict(STATE), checkpoint_id=root / "one", no_dist=True)
    (root / "one" / "config.json").write_bytes(b"{}")
    async with CheckpointEngine(root) as engine:
        assert (await engine.verify("one")).foreign == ("config.json",)
        async with engine.checkpoint("one") as checkpoint:
            with pytest.raises(LoadError, match=r"no file 'config\.json'; attached to it: none"):
                await checkpoint.file("config.json")


async def test_files_lie_beside_those_of_a_format_for_others(root: Path) -> None:
    async with CheckpointEngine(root, format=SafetensorsFormat()) as engine:
        for content in (b"old", b"new"):
            path = await saved(engine, {"config.json": content}, replace=True)
        assert beside(path).keys() == {"config.json", "model.safetensors"}
        assert (path / "config.json").read_bytes() == b"new"
        report = await engine.verify()
        assert (report.ok, report.foreign) == (True, ())
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").write_bytes(b"theirs")
        assert (await engine.verify()).foreign == ("model.safetensors",)


async def test_copied_checkpoints_know_their_files(root: Path) -> None:
    """Inodes and times are others in a copy."""
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, {"config.json": b"old", "gone": b"old"})
        shutil.copytree(path, root / "copy")
        assert (await engine.verify("copy")).foreign == ()
        await saved(engine, {"config.json": b"new"}, step=None, checkpoint_id="copy", replace=True)
    assert beside(root / "copy") == {"config.json": b"new"}


async def test_each_flipped_bit_of_a_file_is_told(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, FILES)
        for name in ("config.json", "tokenizer.model"):
            file = hidden(path, name)
            for position in (0, file.stat().st_size - 1):
                flip(file, position, 1)
                (damage,) = (await engine.verify()).damage
                assert (damage.file, damage.start, damage.stop) == (file.name, 0, len(FILES[name]))
                assert name in damage.reason
                async with engine.checkpoint() as checkpoint:
                    with pytest.raises(CorruptCheckpointError, match=name):
                        await checkpoint.file(name)
                flip(file, position, 1)
        assert (await engine.verify()).ok


@pytest.mark.parametrize("harm", ["cut", "grown", "gone"])
async def test_a_checkpoint_without_one_of_its_files_is_not_whole(root: Path, harm: str) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, FILES)
        path = await saved(engine, FILES, step=2)
        file = hidden(path, "config.json")
        if harm == "gone":
            file.unlink()
        else:
            os.truncate(file, 3 if harm == "cut" else 1000)
        (damage,) = (await engine.verify(2)).damage
        assert damage.file == file.name
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 1
        with pytest.raises(CorruptCheckpointError, match="attached"):
            await engine.read(2)


async def test_manifests_without_files_are_as_earlier_releases_wrote_them(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, None)
        assert "attached" not in manifest_of(path)
        path = await saved(engine, FILES, step=2)
    manifest = manifest_of(path)
    assert manifest["version"] == 1
    assert [entry["name"] for entry in manifest["attached"]] == list(FILES)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".metadata", ".Metadata", ".hidden", "../config.json", "/etc/config.json", "a/b",
        "a\\b", "C:config.json", "con*", "line\nbreak", "nul\0", "config.json.", "config.json ",
        "\ud800", "x" * 230,
        "__0_0.distcp", "__0_0-0123456789abcdef.distcp", "__other", "manifest-0123456789abcdef.json",
        "Manifest-x.JSON", "data.DistCP", "model.safetensors", "model.safetensors.index.json",
    ],
)  # fmt: skip
async def test_names_that_can_not_be_attached_are_refused(root: Path, name: str) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(ValueError, match="no file can be attached under this name"):
            await engine.save(STATE, step=1, files={name: b""})
        assert await engine.latest() is None
    assert not root.exists() or list(root.iterdir()) == []


@pytest.mark.parametrize(
    "files",
    [{"Config.json": b"", "config.json": b""}, {"caf\u00e9": b"", "cafe\u0301": b""}],
    ids=["case", "accent"],
)
async def test_names_that_some_file_systems_take_for_one_are_refused(
    root: Path, files: dict[str, bytes]
) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(ValueError, match="differ in case or accents alone"):
            await engine.save(STATE, step=1, files=files)


async def test_what_can_not_be_read_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    bad: list[tuple[Any, type[Exception], str]] = [
        ({"a.json": tmp_path / "none"}, ValueError, r"files\['a.json'\].*none.*No such file"),
        ({"a.json": '{"a": 1}'}, ValueError, "A str is a path"),
        ({"a.json": tmp_path}, ValueError, "no regular file"),
        ({"a.json": tmp_path / "fifo"}, ValueError, "no regular file"),
        ({"a.json": 3}, TypeError, "must be bytes or a path, not int"),
        ({3: b""}, TypeError, "the name of a file is a str"),
        (["a.json"], TypeError, "must be a mapping"),
    ]
    async with CheckpointEngine(root) as engine:
        for files, kind, message in bad:
            with pytest.raises(kind, match=message):
                await engine.save(STATE, step=1, files=files)
        await saved(engine, {"a.json": b"fine"})


async def test_large_files_are_refused_before_they_are_read(root: Path, tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(ValueError, match=r"files\['large'\].*more than 64 MiB; put large data into"):
            await engine.save(STATE, step=1, files={"large": tmp_path / "large"})
        half = bytes(33 << 20)
        with pytest.raises(ValueError, match=r"files\['b'\].*more than 64 MiB"):
            await engine.save(STATE, step=1, files={"a": half, "b": half})


async def test_memory_keeps_files_too() -> None:
    async with CheckpointEngine("memory://attached") as engine:
        await (await engine.save(STATE, step=1, files=FILES)).upload_completion
        async with engine.checkpoint() as checkpoint:
            assert {name: await checkpoint.file(name) for name in checkpoint.files} == FILES
        report = await engine.verify()
        assert (report.ok, report.num_files, report.foreign) == (True, 4, ())
    dcp_async.storage.MemoryStorage.clear("attached")


async def test_files_are_read_beside_the_loop(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow file system must not stop the trainer's loop."""
    (tmp_path / "slow").write_bytes(b"slow")
    reading, go_on, inner = threading.Event(), threading.Event(), os.stat

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if path == tmp_path / "slow":
            reading.set()
            assert go_on.wait(60)
        return inner(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    async with CheckpointEngine(root) as engine:
        saving = asyncio.create_task(engine.save(STATE, step=1, files={"slow": tmp_path / "slow"}))
        await asyncio.to_thread(reading.wait)
        assert not saving.done()  # and this loop goes on
        go_on.set()
        await (await saving).upload_completion


async def test_a_file_of_holes_takes_no_memory(root: Path) -> None:
    """A manifest may promise any length, and a file have it without a byte."""
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, {"config.json": b"{}"})
        nbytes = 1 << 42
        os.truncate(hidden(path, "config.json"), nbytes)
        manifest = manifest_file(path)
        body = manifest.read_bytes()[:-29].replace(b'"nbytes":2,', b'"nbytes":%d,' % nbytes)
        manifest.write_bytes(body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}')
        async with engine.checkpoint() as checkpoint:
            assert checkpoint.files == {"config.json": nbytes}
            with pytest.raises(CorruptCheckpointError, match="does not match its checksum"):
                await checkpoint.file("config.json")


async def test_removing_a_checkpoint_takes_its_files_and_leaves_those_of_others(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        path = await saved(engine, FILES)
        (path / "config.json").write_bytes(b"theirs")
        whole = await saved(engine, FILES, step=2)
    storage = LocalStorage(root)
    await storage.remove(path.name)
    await storage.remove(whole.name)
    await storage.close()
    assert beside(path) == {"config.json": b"theirs"}
    assert os.listdir(path) == ["config.json"]
    assert not whole.exists()
