"""Directories of safetensors files, honest ones with damage where it matters: headers, indexes, configs.

In: a random.Random. Out: file name -> bytes. The same seed gives the same directories.
"""

from __future__ import annotations

import json
import struct
from functools import cache
from random import Random
from typing import Any

import torch
from safetensors.torch import save

from tests.fuzz.generate import NUMBERS, changed_json, damaged

_INDEX = "model.safetensors.index.json"
_FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_SHARDS = ("shard-00000-model-00001-of-00001.safetensors", "shard-00001-model-00001-of-00001.safetensors")
_KINDS = ("F32", "BF16", "F8_E4M3", "F8_E8M0", "U8", "I64", "C64", "F4", "BOOL", "")


def _tensors() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    first = {
        "w": torch.zeros(8, 8),
        "q.weight": torch.ones(20, 12).to(torch.float8_e4m3fn),
        "q.weight_scale_inv": torch.ones(3, 2),
        "empty": torch.zeros(0, 3),
    }
    second = {
        "b": torch.zeros(8),
        "e_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8),
        "e_scales": torch.zeros(2, 3, dtype=torch.uint8),
        "scalar": torch.tensor(1.0),
    }
    return first, second


@cache
def _whole() -> dict[str, bytes]:
    """As transformers writes it."""
    parts = dict(zip(_FILES, _tensors(), strict=True))
    weights = {name: file for file, part in parts.items() for name in part}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 6]}}
    return {
        **{file: save(part, metadata={"format": "pt"}) for file, part in parts.items()},
        _INDEX: json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}).encode(),
        "config.json": json.dumps(config).encode(),
    }


@cache
def _parts() -> dict[str, bytes]:
    """As torch's writer has two ranks write it."""
    files = {}
    for rank, file in enumerate(_SHARDS):
        whole, _ = _tensors()
        part = {"w": whole["w"][rank * 4 :][:4].clone(), f"own{rank}": whole["empty"]}
        places = {"w": {"saved_offsets": [rank * 4, 0]}, f"own{rank}": {"saved_offsets": [0, 0]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"}
        files[file] = save(part, metadata=metadata)
    return files


def _taken_apart(file: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def _put_together(header: Any, data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _lying_entry(random: Random, header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """One tensor says something else of itself, its bytes adapted to it or not."""
    header = json.loads(json.dumps(header))
    name = random.choice([name for name in header if name != "__metadata__"])
    entry, kind = header[name], random.randrange(7)
    if kind == 0:
        entry["dtype"] = random.choice(_KINDS)
    elif kind == 1 and entry["shape"]:
        entry["shape"][random.randrange(len(entry["shape"]))] = random.choice((*NUMBERS, 1 << 61))
    elif kind == 2:
        # no bytes, and extents whose product is more than a number holds
        extents = random.choices((1 << 40, 1 << 61, 3), k=random.choice((1, 2, 63)))
        entry["shape"] = [0, *extents]
        entry["data_offsets"][1] = entry["data_offsets"][0]
    elif kind == 3:
        entry["data_offsets"][random.randrange(2)] = random.choice((*NUMBERS, len(data), len(data) - 1))
    elif kind == 4:
        # of a length that fits, so that whatever comes next is asked
        last = len(data)
        size = random.choice((0, 1, 2, 7, 300))
        header[random.choice(("x", "w", "q.weight_scale_inv", "e_scales", "w.x", "", "a/b", "\u00e9"))] = {
            "dtype": "U8",
            "shape": random.choice(([size], [size, 1], [1, size, 1], [1] * 20 + [size])),
            "data_offsets": [last, last + size],
        }
        data += bytes(size)
    elif kind == 5:
        entry["shape"] = entry["shape"][::-1]
    else:
        sharding = {name: {"saved_offsets": [random.choice((*NUMBERS, 2)) for _ in entry["shape"]]}}
        header["__metadata__"] = {"DCP_SHARDING_INFO": json.dumps(sharding)}
    return header, data


def _changed_file(random: Random, file: bytes) -> bytes:
    header, data = _taken_apart(file)
    kind = random.randrange(10)
    if kind <= 4:
        for _ in range(random.randint(1, 2)):
            header, data = _lying_entry(random, header, data)
        return _put_together(header, data)
    if kind <= 6:
        return _put_together(changed_json(random, header), data)
    if kind == 7:  # JSON that is none, or holds a key twice
        raw = damaged(random, json.dumps(header).encode(), b'{"w": [0, 1]}')
        return struct.pack("<Q", len(raw)) + raw + data
    if kind == 8:
        number = random.choice((*NUMBERS, len(file), len(file) - 8, 100_000_001)) & ((1 << 64) - 1)
        return struct.pack("<Q", number) + file[8:]
    return damaged(random, file, data)


def honest_models() -> list[dict[str, bytes]]:
    """What is damaged here."""
    return [_whole(), _parts()]


def changed_model(random: Random) -> dict[str, bytes]:
    """One directory."""
    files = dict(random.choice(honest_models()))
    texts = [file for file in files if file.endswith(".json")]
    kind = random.randrange(8)
    if kind == 0 and texts:
        file = random.choice(texts)
        files[file] = json.dumps(changed_json(random, json.loads(files[file]))).encode()
    elif kind == 1 and texts:
        file = random.choice(texts)
        files[file] = damaged(random, files[file], files[file])
    elif kind == 2:
        del files[random.choice(list(files))]
    else:
        for file in random.sample([file for file in files if file.endswith(".safetensors")], k=1 + kind % 2):
            files[file] = _changed_file(random, files[file])
    return files
