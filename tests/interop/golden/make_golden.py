"""Makes the golden checkpoints again: ``PYTHONPATH=. python tests/interop/golden/make_golden.py [NAME ...]``.

Needs torch alone, and zstandard for `zstd`. `py313` is made on Python 3.13, all others on any; those named
after a torch are made with that one. What each of them holds follows from stock_states.py, so the files need
not be made again for a test to change.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as LegacyProperties
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.interop.rank_jobs import run_world
from tests.interop.stock_states import leaf_state, nested_state, strided_state


def save(path: Path, state: dict[str, Any] | None = None, **options: Any) -> None:
    writer = FileSystemWriter(path, sync_files=False, **options)
    dcp.save(nested_state() if state is None else state, storage_writer=writer, no_dist=True)


@contextlib.contextmanager
def legacy_items() -> Iterator[None]:
    """``torch.save`` as it was before torch 1.6, which wrote no zip."""
    usual = torch.save
    torch.save = functools.partial(usual, _use_new_zipfile_serialization=False)
    try:
        yield
    finally:
        torch.save = usual


def save_legacy_items(path: Path) -> None:
    with legacy_items():
        save(path)


def save_legacy_metadata(path: Path) -> None:
    """`.metadata` with the classes and the fields of torch 2.0."""
    save(path)
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            now: Any = entry.properties
            before: Any = LegacyProperties(
                dtype=now.dtype,
                layout=now.layout,
                requires_grad=now.requires_grad,
                memory_format=now.memory_format,
                pin_memory=now.pin_memory,
            )
            entry.properties = before
    for index in metadata.storage_data:
        del index.__dict__["index"]
    for field in ("planner_data", "storage_meta", "version"):
        del metadata.__dict__[field]
    file.write_bytes(pickle.dumps(metadata, protocol=4))


def save_in_world(world_size: int, job: str, path: Path) -> None:
    directory = path.with_name(f"{path.name}-world")
    run_world(directory, world_size, [job])
    (directory / job).rename(path)
    directory.rmdir()


GOLDEN: dict[str, Callable[[Path], None]] = {
    "default": save,
    "threads": lambda path: save(path, thread_count=3),
    "file_per_item": lambda path: save(path, single_file_per_rank=False),
    "zstd": lambda path: save(path, _extensions=[ZStandard()]),
    "strided": lambda path: save(path, strided_state()),
    "leaves": lambda path: save(path, leaf_state()),
    "legacy_metadata": save_legacy_metadata,
    "legacy_items": save_legacy_items,
    "per_rank_2": lambda path: save_in_world(2, "no_collectives", path),
    "sharded_4": lambda path: save_in_world(4, "collectives", path),
    "py313": save,
    "torch_2_14": save,
    "torch_2_14_checkpointable_2": lambda path: save_in_world(2, "checkpointable", path),
    "torch_2_15": save,
    "torch_2_15_strided": lambda path: save(path, strided_state()),
    "torch_2_15_sharded_2": lambda path: save_in_world(2, "collectives", path),
}


def torch_of(name: str) -> str | None:
    """The torch (X.Y) that a checkpoint is made with; None for any."""
    _, is_named, version = name.partition("torch_")
    return ".".join(version.split("_")[:2]) if is_named else None


def make(name: str) -> None:
    if name == "py313" and sys.version_info < (3, 13):
        raise SystemExit("py313 is there for what Python 3.13 pickles; run this on it")
    wanted = torch_of(name)
    if wanted is not None and not torch.__version__.startswith(f"{wanted}."):
        raise SystemExit(f"{name} is there for what torch {wanted} writes; run this with it")
    os.chdir(Path(__file__).parent)
    shutil.rmtree(name, ignore_errors=True)
    GOLDEN[name](Path(name))  # stock keeps this path in `.metadata`, so it is relative


if __name__ == "__main__":
    for chosen in sys.argv[1:] or [name for name in GOLDEN if name != "py313" and torch_of(name) is None]:
        make(chosen)
