"""What save() and load() take for a step, a name, notes and a root: normalised, or refused before anything is
written."""

from __future__ import annotations

import enum
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch

from dcp_async import CheckpointEngine, sync
from tests.support.doubles import PATIENCE, assert_holds_only, assert_same, committed

STATE = {"w": torch.arange(100.0), "n": 1}


class Color(str, enum.Enum):  # noqa: UP042 - a StrEnum would be str(itself)
    RED = "red"


class Epoch(enum.IntEnum):
    LAST = 5


class Name(str):
    def __str__(self) -> str:
        return "something else"


def circular() -> dict[str, Any]:
    notes: dict[str, Any] = {}
    notes["self"] = notes
    return notes


def deep(levels: int) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    for _ in range(levels):
        notes = {"in": notes}
    return notes


@pytest.mark.parametrize(
    "step",
    [np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.int32), Epoch.LAST],
    ids=lambda step: f"{type(step).__name__} {getattr(step, 'dtype', '')}",
)
async def test_a_step_that_is_an_integer_exactly_is_that_integer(root: Path, step: Any) -> None:
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save(STATE, step=step)).upload_completion
        assert (info.step, type(info.step), info.checkpoint_id) == (5, int, "step-00000005")
        assert (await engine.load({"w": torch.zeros(100)}, step, strict=False)).step == 5
        assert_same(await engine.read(step), STATE)
        found = await engine.latest()
        assert found is not None
        assert found.step == 5


NO_STEPS: dict[str, Any] = {
    "True": True,
    "False": False,
    "numpy bool": np.True_,
    "tensor of bool": torch.tensor(True),
    "float": 1.0,
    "numpy float": np.float64(1),
    "tensor of float": torch.tensor(1.0),
    "str": "5",
    "bytes": b"5",
    "negative": -1,
    "numpy negative": np.int64(-1),
    "2**63": 1 << 63,
    "5,000 digits": 10**5000,
    "NaN": float("nan"),
    "list": [5],
    "two": torch.tensor([1, 2]),
    "object": object(),
    "complex": 5j,
    "meta": torch.empty((), dtype=torch.int64, device="meta"),
}


@pytest.mark.parametrize("which", NO_STEPS)
async def test_a_step_that_is_none_is_refused_before_anything_is_written(root: Path, which: str) -> None:
    step = NO_STEPS[which]
    async with CheckpointEngine(root) as engine:
        with pytest.raises((TypeError, ValueError), match="step"):
            await engine.save(STATE, step=step)
        assert not root.exists()
        assert engine.pending == ()
        await (await engine.save(STATE, step=1)).upload_completion
    assert_holds_only(root, ["step-00000001"])


async def test_the_largest_step_survives(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=(1 << 63) - 1)).upload_completion
        assert_same(await engine.read((1 << 63) - 1), STATE)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (Color.RED, "red"),
        (np.str_("best"), "best"),
        (Name("own"), "own"),
        (PurePosixPath("a.b"), "a.b"),
        ("\u00fc\u6f22", "\u00fc\u6f22"),
    ],
    ids=["enum", "numpy", "subclass", "path", "unicode"],
)
async def test_a_name_is_the_text_that_it_holds(root: Path, name: Any, text: str) -> None:
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save(STATE, checkpoint_id=name)).upload_completion
        assert (info.checkpoint_id, type(info.checkpoint_id)) == (text, str)
        assert_same(await engine.read(name), STATE)
        assert (await engine.load({"n": 0}, name, strict=False)).checkpoint_id == text
    assert committed(root) == [text]


@pytest.mark.parametrize(
    "name",
    [
        "a\nb", "a\rb", "tab\t", "\x7f", "a\u2028b", "\ud800", chr(0xDCFF), "x" * 256, "\u00e4" * 128, 7,
        b"best", PurePosixPath("a/b"), True, ["best"], np.str_(""), Name("latest"),
    ],
    ids=ascii,
)  # fmt: skip
async def test_a_name_that_can_be_none_is_refused_before_anything_is_written(root: Path, name: Any) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises((TypeError, ValueError), match="checkpoint_id"):
            await engine.save(STATE, checkpoint_id=name)
        assert not root.exists()
        await (await engine.save(STATE, step=1)).upload_completion
    assert_holds_only(root, ["step-00000001"])


NO_NOTES: dict[str, Any] = {
    "int key": {1: "a"},
    "inner int key": {"a": {2: 1}},
    "None key": {None: 1},
    "NaN": {"x": float("nan")},
    "infinity": {"x": [float("inf")]},
    "set": {"x": {1, 2}},
    "bytes": {"x": b"b"},
    "tensor": {"x": torch.ones(1)},
    "numpy integer": {"x": np.int64(1)},
    "numpy float": {"x": np.float32(1)},
    "lone surrogate": {"x": "\ud800"},
    "lone surrogate in a key": {"\ud800": 1},
    "circular": circular(),
    "very deep": deep(2000),
    "deep": deep(101),
    "5,000 digits": {"x": 10**5000},
    "too long": {"x": "y" * (2 << 20)},
    "list of pairs": [("a", 1)],
    "text": "text",
    "number": 5,
}


@pytest.mark.parametrize("which", NO_NOTES)
async def test_notes_that_are_no_json_are_refused_before_anything_is_written(root: Path, which: str) -> None:
    notes = NO_NOTES[which]
    async with CheckpointEngine(root) as engine:
        with pytest.raises((TypeError, ValueError), match="notes"):
            await engine.save(STATE, step=1, notes=notes)
        assert not root.exists()
        await (await engine.save(STATE, step=1)).upload_completion
    assert_holds_only(root, ["step-00000001"])


async def test_notes_come_back_as_plain_json(root: Path) -> None:
    notes: Any = {
        "t": (1, 2),
        "e": Epoch.LAST,
        "c": Color.RED,
        Name("k"): Name("v"),
        "f": np.float64(0.5),
        "b": True,
    }
    plain = {"t": [1, 2], "e": 5, "c": "red", "k": "v", "f": 0.5, "b": True}
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save(STATE, step=1, notes=notes)).upload_completion
        again = await engine.latest()
    assert again is not None
    for found in (info, again):
        assert found.notes == plain
        assert [type(value) for value in found.notes.values()] == [type(value) for value in plain.values()]
        assert {type(key) for key in found.notes} == {str}


async def test_notes_that_change_after_save_are_those_that_were_passed(root: Path) -> None:
    notes: dict[str, Any] = {"list": [1]}
    async with CheckpointEngine(root) as engine:
        response = await engine.save(STATE, step=1, notes=notes)
        notes["list"].append(2)
        info = await response.upload_completion
    assert info.notes == {"list": [1]}


@pytest.mark.parametrize("replace", [None, 1, "no", np.False_, torch.tensor(True)], ids=repr)
async def test_a_replace_that_is_no_bool_is_refused(root: Path, replace: Any) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(TypeError, match="replace"):
            await engine.save(STATE, step=1, replace=replace)
        assert not root.exists()


@pytest.mark.parametrize("source", [None, 1.5, True, b"latest", ["latest"], 5j], ids=repr)
async def test_a_source_that_can_be_none_is_refused(root: Path, source: Any) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(STATE, step=1)).upload_completion
        with pytest.raises(TypeError, match="checkpoint is named"):
            await engine.load({"n": 0}, source)
        with pytest.raises(TypeError, match="checkpoint is named"):
            await engine.read(source)


# --- roots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path, PurePosixPath])
def test_a_tilde_in_a_root_is_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with sync.CheckpointEngine(kind("~/runs/a")) as engine:
        engine.save(STATE, step=1).upload_completion.result(PATIENCE)
    assert committed(tmp_path / "home" / "runs" / "a") == ["step-00000001"]
    assert not (tmp_path / "~").exists()


def test_a_tilde_behind_a_dot_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with sync.CheckpointEngine("./~") as engine:
        engine.save(STATE, step=1).upload_completion.result(PATIENCE)
    assert committed(tmp_path / "~") == ["step-00000001"]


@pytest.mark.parametrize("root", ["~nobody-of-this-name/run", b"bytes", 5, None, ""], ids=repr)
def test_a_root_that_can_be_none_is_refused_at_once(root: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="root"):
        sync.CheckpointEngine(root)


def test_a_relative_root_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    engine = sync.CheckpointEngine("run")
    os.chdir(tmp_path / "elsewhere")
    with engine:
        engine.save(STATE, step=1).upload_completion.result(PATIENCE)
    assert committed(tmp_path / "run") == ["step-00000001"]
