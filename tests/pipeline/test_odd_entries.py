"""What else may lie under a root: entries that are no checkpoint, however much they look like one, are passed
over by every verb, with one warning that names them; none of them is waited for, followed or read."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from dcp_async import (
    CheckpointEngine,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    SaveError,
)
from dcp_async.storage.local.storage import LocalStorage
from tests.support.doubles import MIB, assert_same, manifest_file

STATE = {"w": torch.arange(100.0), "n": 1}
BAD = "step-00000009"
GOOD = "step-00000005"


def a_directory(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as unused:
            unused.bind(path.name)
    finally:
        os.chdir(here)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_link_out_of_the_root(path: Path) -> None:
    path.symlink_to("/etc/passwd")


def a_relative_link_out_of_the_root(path: Path) -> None:
    path.symlink_to("../../outside")
    path.parent.parent.parent.joinpath("outside").write_bytes(b"\x80\x02N.")


def a_link_to_nothing_out_of_the_root(path: Path) -> None:
    path.symlink_to("/nowhere/.metadata")


def a_link_to_nothing_beside_it(path: Path) -> None:
    path.symlink_to("gone")


def a_link_to_a_fifo_beside_it(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def terabytes_of_nothing(path: Path) -> None:
    path.touch()
    os.truncate(path, 8 << 40)


def a_gigabyte_of_nothing(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


KINDS = [
    a_directory,
    a_fifo,
    a_socket,
    a_loop,
    a_link_to_a_device,
    a_link_out_of_the_root,
    a_relative_link_out_of_the_root,
    a_link_to_nothing_out_of_the_root,
    a_link_to_nothing_beside_it,
    a_link_to_a_fifo_beside_it,
    terabytes_of_nothing,
    a_gigabyte_of_nothing,
]


async def save(root: Path, *steps: int) -> None:
    async with CheckpointEngine(root) as engine:
        for step in steps:
            await engine.save(STATE, step=step)


async def assert_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All verbs agree on GOOD, and one warning names BAD."""
    caplog.set_level(logging.WARNING)
    async with CheckpointEngine(root) as engine:
        for _ in range(3):
            info = await engine.latest()
            assert info is not None
            assert info.checkpoint_id == GOOD
            assert [info.checkpoint_id async for info in engine.checkpoints()] == [GOOD]
        warnings = [record.getMessage() for record in caplog.records if BAD in record.getMessage()]
        assert len(warnings) == 1, warnings
        target = {"w": torch.zeros(100), "n": 0}
        report = await engine.load(target)
        assert_same(target, STATE)
        assert (report.checkpoint_id, report.skipped) == (GOOD, (BAD,))
        assert_same(await engine.read(), STATE)
        with pytest.raises(CorruptCheckpointError, match=BAD):
            await engine.read(BAD)
        with pytest.raises(CorruptCheckpointError, match=BAD):
            await engine.load(target, BAD)
        assert_same(await engine.read(5), STATE)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_entry_whose_metadata_is_no_regular_file_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, kind: Callable[[Path], None]
) -> None:
    await save(root, 5)
    (root / BAD).mkdir()
    kind(root / BAD / ".metadata")
    await assert_passed_over(root, caplog)
    async with CheckpointEngine(root) as engine:  # and it does not keep others from being saved and swept
        response = await engine.save(STATE)
        info = await response.upload_completion
        assert info.step == 10
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 10


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not a_link_to_nothing_beside_it])
async def test_a_checkpoint_whose_manifest_is_no_regular_file_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, kind: Callable[[Path], None]
) -> None:
    await save(root, 5, 9)
    path = manifest_file(root / BAD)
    path.unlink()
    kind(path)
    await assert_passed_over(root, caplog)


@pytest.mark.parametrize("kind", [a_directory, a_fifo, a_socket, a_loop, a_link_to_a_fifo_beside_it])
async def test_a_checkpoint_whose_data_file_is_no_regular_file_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, kind: Callable[[Path], None]
) -> None:
    await save(root, 5, 9)
    (path,) = (root / BAD).glob("*.distcp")
    path.unlink()
    kind(path)
    await assert_passed_over(root, caplog)


def sign(manifest: Path, old: str, new: str) -> None:
    """Put ``new`` in place of ``old`` in a manifest, as whoever writes one by hand would."""
    body = manifest.read_text()[:-29]
    assert old in body
    changed = body.replace(old, new).encode()
    manifest.write_bytes(changed + b',"digest":"%s"}' % xxhash.xxh3_64_hexdigest(changed).encode())


async def test_a_data_file_that_only_pretends_to_be_long_is_not_read(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its footer's table would take a gigabyte."""
    await save(root, 5, 9)
    (path,) = (root / BAD).glob("*.distcp")
    nbytes = path.stat().st_size
    os.truncate(path, 8 << 40)
    sign(manifest_file(root / BAD), f'"nbytes":{nbytes}', f'"nbytes":{8 << 40}')
    tracemalloc.start()
    try:
        async with CheckpointEngine(root) as engine:
            report = await engine.load({"w": torch.zeros(100), "n": 0})
        assert (report.checkpoint_id, report.skipped) == (GOOD, (BAD,))
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["a\\u0000b", "a\\ud800b", "x" * 300, "..", ".", "", "a/", "../..", "/etc/passwd", "manifest/.."]
)
async def test_a_manifest_that_names_what_no_file_is_called_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    await save(root, 5, 9)
    (path,) = (root / BAD).glob("*.distcp")
    sign(manifest_file(root / BAD), f'"{path.name}"', f'"{name}"')
    await assert_passed_over(root, caplog)


@pytest.mark.parametrize("file", [".metadata", "manifest-*.json", "*.distcp"])
async def test_a_file_that_this_process_may_not_read_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    await save(root, 5, 9)
    (closed,) = (root / BAD).glob(file)
    inode, real = closed.stat().st_ino, os.open

    def guarded(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        fd = real(path, flags, *rest, **options)
        if os.fstat(fd).st_ino == inode:
            os.close(fd)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return fd

    monkeypatch.setattr(os, "open", guarded)
    await assert_passed_over(root, caplog)


async def test_a_directory_that_is_closed_to_this_process_is_passed_over(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(root, 5, 9)
    real = {name: getattr(os, name) for name in ("open", "lstat", "stat", "listdir")}

    def guarded(name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if BAD in str(path) and not (name == "lstat" and str(path).endswith(BAD)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            return real[name](path, *rest, **options)

        return call

    for name in real:
        monkeypatch.setattr(os, name, guarded(name))
    await assert_passed_over(root, caplog)


async def test_a_manifest_that_is_no_file_beside_the_real_one_does_no_harm(root: Path) -> None:
    await save(root, 5)
    for number, kind in enumerate((a_fifo, a_directory, a_loop, a_link_to_a_device)):
        kind(root / GOOD / f"manifest-{number:016x}.json")
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read(), STATE)


async def test_names_that_are_no_plain_text_break_no_list(root: Path) -> None:
    await save(root, 5)
    odd = [os.fsdecode(b"step-\xff\xfe-7"), "two\nlines 8", "tab\t9", "\u202e10"]
    for name in odd:
        os.rename(root / GOOD, root / name)
        await save(root, 5)
        (root / (name + "x")).mkdir()
    async with CheckpointEngine(root) as engine:
        listed = [info.checkpoint_id async for info in engine.checkpoints()]
        assert sorted(listed) == sorted([GOOD, *odd])
        for name in odd:
            assert_same(await engine.read(name), STATE)
        with pytest.raises(CheckpointNotFoundError) as caught:
            await engine.read("no such one")
        str(caught.value).encode()


async def test_a_root_of_odd_entries_alone_has_no_newest(root: Path) -> None:
    for number, kind in enumerate(KINDS):
        (root / f"step-{number:08d}").mkdir(parents=True)
        kind(root / f"step-{number:08d}" / ".metadata")
    async with CheckpointEngine(root) as engine:
        assert await engine.latest() is None
        assert [info async for info in engine.checkpoints()] == []
        with pytest.raises(CorruptCheckpointError):
            await engine.read()
        info = await (await engine.save(STATE)).upload_completion
        assert info.step == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_lease_that_is_no_file_protects_what_is_below_it(
    root: Path, kind: Callable[[Path], None]
) -> None:
    (root / BAD).mkdir(parents=True)
    kind(root / BAD / ".lease-0123456789abcdef")
    await save(root, 10)
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read(), STATE)


@pytest.mark.parametrize("kind", [a_fifo, a_socket, a_loop, a_link_to_a_device, a_gigabyte_of_nothing])
@pytest.mark.parametrize("replace", [False, True])
async def test_a_name_that_is_no_directory_is_in_nobodys_way_and_not_saved_under(
    root: Path, kind: Callable[[Path], None], replace: bool
) -> None:
    await save(root, 5)
    kind(root / BAD)
    async with CheckpointEngine(root) as engine:
        assert_same(await engine.read(), STATE)
        assert [info.checkpoint_id async for info in engine.checkpoints()] == [GOOD]
        with pytest.raises(SaveError, match=r"no directory|a link") as caught:
            await (await engine.save(STATE, step=9, replace=replace)).upload_completion
        assert not isinstance(caught.value, CheckpointExistsError)
        await (await engine.save(STATE, step=10)).upload_completion


# --- references and roots -----------------------------------------------------------------------------


class Name(str):
    def __str__(self) -> str:
        return "something else"


REFERENCES: list[Any] = [
    5,
    5.0,
    np.int64(5),
    np.uint8(5),
    np.array(5),
    np.array([5]),
    np.float32(5.0),
    torch.tensor(5),
    torch.tensor([5]),
    torch.tensor(5.0),
    GOOD,
    Name(GOOD),
    np.str_(GOOD),
    Path(GOOD),
]


@pytest.mark.parametrize("ref", REFERENCES, ids=lambda ref: f"{type(ref).__name__}-{ref!r}")
async def test_a_reference_may_be_of_any_type_that_means_a_name_or_a_step(root: Path, ref: Any) -> None:
    await save(root, 5, 9)
    async with CheckpointEngine(root) as engine:
        target = {"w": torch.zeros(100), "n": 0}
        assert (await engine.load(target, ref)).checkpoint_id == GOOD
        assert_same(await engine.read(ref), STATE)


@pytest.mark.parametrize(
    "ref", [None, True, 5.5, float("nan"), b"step", torch.zeros(2), np.True_, [5]], ids=repr
)
async def test_what_means_neither_a_name_nor_a_step_is_refused_by_type(root: Path, ref: Any) -> None:
    await save(root, 1)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(TypeError, match="named by"):
            await engine.read(ref)


async def test_a_tilde_in_a_root_is_the_home_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root)
    for way in ("~/run", Path("~/run")):
        await save(way, 5)  # type: ignore[arg-type]
        assert (root / "run" / GOOD).is_dir()
        assert LocalStorage(way).root == root / "run"
        assert not (root / "~").exists()
        (root / "run" / GOOD).rename(root / "run" / f"used-{type(way).__name__}")
