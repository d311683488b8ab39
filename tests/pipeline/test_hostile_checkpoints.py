"""A checkpoint whose checksums all hold and whose manifest or tensors make no sense: errors of the tree."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from dcp_async import CheckpointError, LoadError, sync

_MODULUS = sys.hash_info.modulus


def _save(root: Path) -> Path:
    with sync.CheckpointEngine(root) as engine:
        state = {"w": torch.ones(4, 6).T, "k": {(1, 2): torch.ones(3), 5: 1}, "n": 3}
        engine.save(state, step=1, notes={"a": 1}).upload_completion.result(60)
    (found,) = (root / "step-00000001").glob("manifest-*.json")
    return found


def _key(raw: bytes) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        entries = manifest["structure"][1]["k"][1]
        pickled = next(key for key, _ in entries if isinstance(key, dict))
        pickled["pickle"] = base64.b64encode(raw).decode()

    return change


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *names, value = path

    def change(manifest: dict[str, Any]) -> None:
        target: Any = manifest
        for name in names[:-1]:
            target = target[name]
        target[names[-1]] = value

    return change


def _deep(depth: int) -> Any:
    tree: Any = None
    for _ in range(depth):
        tree = ["dict", {"a": tree}]
    return tree


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "key_that_hashes_for_ever": _key(b"\x80\x02)" + b"2\x86" * 60 + b"."),
    "key_nested_deep": _key(b"\x80\x02N" + b"\x85" * 100_000 + b"."),
    "key_of_a_list": _key(pickle.dumps([1], 2)),
    "key_that_is_cut": _key(pickle.dumps((1, 2), 2)[:-3]),
    "key_that_runs_code": _key(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "keys_that_hash_alike": lambda manifest: manifest["structure"][1]["k"][1].extend(
        [i * _MODULUS, None] for i in range(1, 12_000)
    ),
    "strides_of_terabytes": _set("strides", {"w": [1, 1 << 50]}),
    "strides_that_overlap": _set("strides", {"w": [0, 0]}),
    "strides_of_another_rank": _set("strides", {"w": [1]}),
    "strides_of_text": _set("strides", {"w": "ab"}),
    "tree_without_end": _set("structure", _deep(400)),
    "tree_of_nothing": _set("structure", None),
    "tree_of_other_names": _set("structure", ["dict", {"x": None}]),
    "step_of_a_bool": _set("step", True),
    "time_of_text": _set("time", "now"),
    "world_of_a_list": _set("world_size", [1]),
    "files_of_numbers": _set("files", [1, 2]),
    "file_of_a_float": _set("files", 0, "nbytes", 1.5),
    "file_of_a_surrogate": _set("files", 0, "name", "\ud800"),
    "name_of_a_surrogate": _set("checkpoint_id", "\ud800"),
    "notes_of_text": _set("notes", "a"),
    "exotic_of_numbers": _set("exotic", [1]),
    "exotic_of_mappings": _set("exotic", [{}]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_only_errors_of_the_tree_come_out(name: str, tmp_path: Path) -> None:
    file = _save(tmp_path)
    manifest = json.loads(file.read_bytes())
    del manifest["digest"]
    CHANGES[name](manifest)
    body = json.dumps(manifest, separators=(",", ":")).encode()[:-1]
    file.write_bytes(body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}')
    target = {"w": torch.zeros(6, 4), "k": {(1, 2): torch.zeros(3), 5: 0}, "n": 0}
    with sync.CheckpointEngine(tmp_path) as engine:
        assert [info.step for info in engine.checkpoints()] in ([], [1])
        engine.latest()
        with pytest.raises(LoadError) as caught:
            engine.read(1)
        assert len(str(caught.value)) < 2000
        try:
            engine.load(target, 1)
        except CheckpointError as error:
            str(error).encode()


def test_tensors_larger_than_their_bytes_take_no_memory(tmp_path: Path) -> None:
    file = _save(tmp_path)
    metadata = file.parent / ".metadata"
    large = torch.Size([1 << 15, 1 << 15, 1 << 10])
    found = pickle.loads(metadata.read_bytes())
    entry = found.state_dict_metadata["w"]
    entry.size = large
    entry.chunks[0].sizes, entry.chunks[0].offsets = large, torch.Size([0, 0, 0])
    found.storage_data = {
        type(index)(
            index.fqn, torch.Size([0, 0, 0]) if index.fqn == "w" else index.offset, index.index
        ): place
        for index, place in found.storage_data.items()
    }
    metadata.write_bytes(pickle.dumps(found))
    manifest = json.loads(file.read_bytes())
    del manifest["digest"]
    manifest["metadata_digest"] = xxhash.xxh3_64_hexdigest(metadata.read_bytes())
    body = json.dumps(manifest, separators=(",", ":")).encode()[:-1]
    file.write_bytes(body + b',"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}')
    with sync.CheckpointEngine(tmp_path) as engine, pytest.raises(LoadError, match="bytes for its"):
        engine.read(1)
