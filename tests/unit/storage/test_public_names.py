"""Public names: given whole, or finished by a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dcp_async._names import blob_file
from dcp_async.storage.local.public_names import PublicNames, finish_names

OLD, NEW = "a" * 16, "b" * 16
NAMES = ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json")


def blobs(directory: Path, uid: str) -> dict[str, str]:
    """Public name -> file."""
    names = {name: blob_file(number, uid) for number, name in enumerate(NAMES)}
    for file in names.values():
        (directory / file).write_text(uid)
    return names


def prepared(directory: Path) -> PublicNames:
    """The names of NEW, where those of OLD were given."""
    old = PublicNames(directory, OLD, blobs(directory, OLD))
    old.prepare()
    old.give()
    new = PublicNames(directory, NEW, blobs(directory, NEW))
    new.prepare()
    return new


class KilledError(BaseException):
    """In place of a kill."""


def die_at(point: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the call number ``point`` that gives or takes a name be the last."""
    calls = 0

    def counted(fn: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                raise KilledError
            return fn(*args, **options)

        return call

    monkeypatch.setattr(os, "link", counted(os.link))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize("point", range(1, 10))
def test_names_that_a_kill_left_out_are_given_by_the_sweep(
    point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = prepared(tmp_path)
    with monkeypatch.context() as patch:
        die_at(point, patch)
        with pytest.raises(KilledError):
            names.give()
    found = {(tmp_path / name).read_text() for name in NAMES if (tmp_path / name).exists()}
    assert len(found) <= 1, "names of two saves side by side"
    finish_names(tmp_path, NEW, [name for name in os.listdir(tmp_path) if NEW in name])
    assert {name: (tmp_path / name).read_text() for name in NAMES} == dict.fromkeys(NAMES, NEW)
    assert not list(tmp_path.glob(".copy-*"))


def test_what_somebody_has_put_there_meanwhile_stays(tmp_path: Path) -> None:
    PublicNames(tmp_path, NEW, blobs(tmp_path, NEW)).prepare()
    (tmp_path / NAMES[1]).write_text("theirs")
    with pytest.raises(FileExistsError):
        finish_names(tmp_path, NEW, [name for name in os.listdir(tmp_path) if NEW in name])
    assert (tmp_path / NAMES[1]).read_text() == "theirs"


def test_what_lies_aside_before_the_commit_is_not_found_by_its_ending(tmp_path: Path) -> None:
    PublicNames(tmp_path, NEW, blobs(tmp_path, NEW)).prepare()
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.json")]
