"""A manifest is what its schema says, or it is damaged: whatever its own checksum says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import xxhash

from dcp_async.formats.manifest import (
    AttachedEntry,
    FileEntry,
    decode_gist,
    decode_manifest,
    encode_manifest,
    structure_json,
)
from dcp_async.formats.manifest_fields import ManifestError
from dcp_async.formats.tree import children_of, leaf_names
from dcp_async.formats.tree_json import MAX_TREE_DEPTH, tree_from_json, tree_to_json

_HEX = "0123456789abcdef"


def _sound() -> dict[str, Any]:
    raw = encode_manifest(
        checkpoint_id="step-1", uid=_HEX, step=1, time=1.5, world_size=2, torch_version="2.13.0",
        metadata=b"x", files=(FileEntry(name="f", nbytes=5, digest=_HEX),), notes={"loss": 0.5},
        constant=structure_json(["dict", {"w": None}], {"w": (1, 2)}, ("e",)),
    )  # fmt: skip
    found: dict[str, Any] = json.loads(raw)
    del found["digest"]
    return found


def signed(text: str) -> bytes:
    body = text.encode()[:-1]
    return body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}'


def test_a_sound_manifest_is_read() -> None:
    found = decode_manifest(signed(json.dumps(_sound())))
    assert (found.step, found.time, found.strides, found.exotic) == (1, 1.5, {"w": (1, 2)}, ("e",))
    assert found.files == (FileEntry(name="f", nbytes=5, digest=_HEX),)
    assert decode_manifest(signed(json.dumps({**_sound(), "step": None, "time": 7}))).step is None


def test_step_time_and_notes_are_read_without_the_tree_behind_them() -> None:
    sound = _sound()
    assert decode_gist(signed(json.dumps(sound))).step == 1
    assert decode_gist(signed(json.dumps(sound, separators=(",", ":")))).step == 1
    assert decode_gist(signed(json.dumps(sound, indent=2))).step == 1
    assert decode_gist(signed(json.dumps({**sound, "step": None}))).step is None
    no_tree = json.dumps(sound).replace('"structure": ', '"structure": no JSON')
    assert decode_gist(signed(no_tree)) == (1, 1.5, sound["notes"])
    with pytest.raises(ManifestError):
        decode_manifest(signed(no_tree))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace('"step"', '"stop"'), "no JSON"),
        (lambda text: text.replace('"step": 1', '"step": "1"'), "step is"),
        (lambda text: text.replace('"step": 1', '"uid": 1, "step": 1'), "twice"),
        (lambda text: text.replace('"step": 1', '"step" 1'), "no :"),
        (lambda text: text.replace('"step": 1', '7: 8, "step": 1'), "no name"),
        (lambda text: text.replace(', "step": 1', '} "step": 1'), "no ,"),
        (lambda text: text.replace('"version": 1', '"version": 3'), "version 3"),
        (lambda text: text.replace("dcp_async", "another"), "format"),
    ],
)
def test_a_step_is_not_read_of_a_damaged_manifest(change: Callable[[str], str], why: str) -> None:
    with pytest.raises(ManifestError, match=why):
        decode_gist(signed(change(json.dumps(_sound()))))


def test_a_step_is_not_read_of_a_manifest_with_another_checksum() -> None:
    raw = signed(json.dumps(_sound()))
    with pytest.raises(ManifestError, match="checksum"):
        decode_gist(raw.replace(b'"step": 1', b'"step": 2'))


WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1 << 70,
    1e300,
    "x",
    "\ud800",
    "a\0b",
    [],
    [None],
    {},
    {"a": 1},
)
RIGHT: dict[str, tuple[Any, ...]] = {
    "format": (),
    "version": (),
    "checkpoint_id": ("x",),
    "uid": (),
    "step": (None, -1, 0, 1 << 70),  # which earlier releases saved
    "time": (-1, 0, 1.5),
    "world_size": (),
    "torch_version": ("x",),
    "metadata_digest": (),
    "files": ([],),
    "structure": WRONG,
    "strides": ({},),
    "exotic": ([],),
    "notes": ({}, {"a": 1}),
}


def test_attached_files_are_read_and_may_be_missing() -> None:
    assert decode_manifest(signed(json.dumps(_sound()))).attached == ()
    entry = {"name": "config.json", "nbytes": 2, "digest": _HEX}
    read = decode_manifest(signed(json.dumps({**_sound(), "attached": [entry]})))
    expected = AttachedEntry(name="config.json", nbytes=2, digest=_HEX)
    assert read.attached == (expected,)
    assert read.attached_files == {f".attached-{_HEX}-config.json": expected}


@pytest.mark.parametrize(
    "wrong",
    [
        *(value for value in WRONG if value != []),
        *([{"name": name, "nbytes": 2, "digest": _HEX}] for name in ("..", "/a", "a/b", "", "a\0", 1, None)),
        *([{"name": "a", "nbytes": nbytes, "digest": _HEX}] for nbytes in (-1, True, 1.0, "1", 1 << 63)),
        *([{"name": "a", "nbytes": 1, "digest": digest}] for digest in ("", _HEX.upper(), None)),
        [{"name": "a", "nbytes": 1}],
        [{"name": "a", "nbytes": 1, "digest": _HEX}] * 2,
    ],
)
def test_attached_files_that_can_not_be_are_damage(wrong: Any) -> None:
    with pytest.raises(ManifestError, match=r"\w"):
        decode_manifest(signed(json.dumps({**_sound(), "attached": wrong})))


@pytest.mark.parametrize("field", RIGHT)
def test_a_field_of_another_type_is_damage(field: str) -> None:
    for value in WRONG:
        raw = signed(json.dumps({**_sound(), field: value}))
        if any(type(value) is type(right) and value == right for right in RIGHT[field]):
            decode_manifest(raw)
            continue
        with pytest.raises(ManifestError, match=r"\w"):
            decode_manifest(raw)
    missing = {name: value for name, value in _sound().items() if name != field}
    with pytest.raises(ManifestError, match=field):
        decode_manifest(signed(json.dumps(missing)))


FILES: dict[str, Any] = {
    "no_object": [5],
    "no_name": [{"nbytes": 1, "digest": _HEX}],
    "name_of_a_number": [{"name": 5, "nbytes": 1, "digest": _HEX}],
    "path": [{"name": "../f", "nbytes": 1, "digest": _HEX}],
    "parent": [{"name": "..", "nbytes": 1, "digest": _HEX}],
    "empty_name": [{"name": "", "nbytes": 1, "digest": _HEX}],
    "negative": [{"name": "f", "nbytes": -1, "digest": _HEX}],
    "float": [{"name": "f", "nbytes": 1.0, "digest": _HEX}],
    "bool": [{"name": "f", "nbytes": True, "digest": _HEX}],
    "huge": [{"name": "f", "nbytes": 1 << 64, "digest": _HEX}],
    "digest": [{"name": "f", "nbytes": 1, "digest": "5"}],
    "twice": [{"name": "f", "nbytes": 1, "digest": _HEX}] * 2,
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_make_no_sense_are_damage(name: str) -> None:
    with pytest.raises(ManifestError, match=r"\w"):
        decode_manifest(signed(json.dumps({**_sound(), "files": FILES[name]})))


@pytest.mark.parametrize("steps", [5, [1.0], [True], [-1], [1 << 64], [[1]], None, "12", [1] * 65])
def test_strides_that_make_no_sense_are_damage(steps: Any) -> None:
    with pytest.raises(ManifestError, match="strides"):
        decode_manifest(signed(json.dumps({**_sound(), "strides": {"w": steps}})))


TEXTS: dict[str, Callable[[str], str]] = {
    "not_a_number": lambda text: text.replace("1.5", "NaN"),
    "infinity": lambda text: text.replace("1.5", "-Infinity"),
    "out_of_range": lambda text: text.replace("1.5", "1e999"),
    "digits": lambda text: text.replace("1.5", "7" * 5000),
    "twice": lambda text: text.replace('"step": 1', '"step": 1, "step": 2'),
    "twice_inside": lambda text: text.replace('"w": null', '"w": null, "w": null'),
    "deep": lambda text: text.replace("0.5", "[" * 100_000 + "]" * 100_000),
    "array": lambda text: f"[{text}]",
    "text": lambda text: '"dcp_async"',
    "cut": lambda text: text[: len(text) // 2] + "}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_makes_no_sense_is_damage(name: str) -> None:
    with pytest.raises(ManifestError, match=r"\w"):
        decode_manifest(signed(TEXTS[name](json.dumps(_sound()))))


def _deep(depth: int) -> Any:
    tree: Any = None
    for _ in range(depth):
        tree = ["dict", {"a": tree}]
    return tree


TREES: dict[str, Any] = {
    "nothing": None,
    "number": 5,
    "kind": [5, {}],
    "list_of_a_dict": ["list", {"a": None}],
    "entries": ["dict", 5],
    "entry": ["dict", [5]],
    "leaf": ["dict", {"a": 5}],
    "key_of_a_list": ["dict", [[[1], None]]],
    "key_without_text": ["dict", [[{"pickle": "gAJLAS4="}, None]]],
    "key_with_a_number_for_text": ["dict", [[{"text": 5, "pickle": "gAJLAS4="}, None]]],
    "key_of_no_base64": ["dict", [[{"text": "a", "pickle": "\u00e9"}, None]]],
    "key_twice": ["dict", [[1, None], [1, None]]],
    "not_a_number_twice": ["dict", [[float("nan"), None], [float("nan"), None]]],
    "deep": _deep(MAX_TREE_DEPTH + 1),
    "deeper": _deep(900),
    "deep_lists": ["list", [_deep(MAX_TREE_DEPTH)]],
}


@pytest.mark.parametrize("name", TREES)
def test_trees_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        tree_from_json(TREES[name])


def test_trees_as_they_are_written_come_back() -> None:
    tree = tree_from_json(_deep(MAX_TREE_DEPTH))
    assert leaf_names(tree) == [".".join("a" * MAX_TREE_DEPTH)]
    mixed: Any = [
        "odict",
        [["a", None], [1, ["list", [None, None]]], [True, None], [1.0, None], [None, None]],
    ]
    assert tree_to_json(tree_from_json(mixed)) == mixed


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("key", [INF, -INF, NAN], ids=repr)
def test_a_key_that_an_earlier_release_wrote_as_a_bare_word_is_read(key: float) -> None:
    """Which is no JSON: it is written as a pickle now, and refused in any other field."""
    manifest = decode_manifest(signed(json.dumps({**_sound(), "structure": ["dict", [[key, None]]]})))
    (entry,) = children_of(tree_from_json(manifest.structure))
    assert repr(entry[0]) == repr(key)
    json.dumps(tree_to_json(["dict", [[key, None]]]), allow_nan=False)
    for field in ("notes", "strides", "exotic"):
        changed = {**_sound(), field: {"a": [key]}}
        with pytest.raises(ManifestError, match=r"\w"):
            decode_manifest(signed(json.dumps(changed)))
