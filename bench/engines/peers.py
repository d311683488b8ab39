"""The adapters of the other peers: `torch.save`, `safetensors`, `torch-checkpointing`, `torchsnapshot`.

In: a nested state dict and a directory. Out: an `Engine`.
Keeps: none of these syncs what it writes; each is synced from outside before it counts as durable, and the
roster marks it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter import WAIT_SECONDS, Adapter, Engine, Pending, join_group, nothing, synced_afterwards
from .files import sync_tree
from .trees import copy_into, named_tensors, plain

if TYPE_CHECKING:
    from torch_checkpointing import CheckpointManager


class _OneFile(Adapter):
    """A blocking writer of one file: the state may be mutated when it returns, durable after a sync."""

    def open(self) -> None:
        """There is nothing to open."""

    def save(self, step: int) -> Pending:
        path = self.path(step)
        start = time.perf_counter()
        self._write(path)
        blocked = time.perf_counter() - start
        return Pending(blocked=blocked, staged=nothing, done=lambda: True, result=lambda: sync_tree(path))

    def load(self, step: int) -> None:
        self._read(self.path(step))

    def close(self) -> None:
        """There is nothing to close."""

    def _write(self, path: Path) -> None:
        raise NotImplementedError

    def _read(self, path: Path) -> None:
        raise NotImplementedError


class TorchSave(_OneFile):
    """`torch.save` and `torch.load`."""

    suffix = ".pt"

    def describe(self) -> str:
        return "torch.save(state, path); torch.load(path, mmap=True, weights_only=True), then copy_"

    def _write(self, path: Path) -> None:
        torch.save(plain(self._state), path)

    def _read(self, path: Path) -> None:
        copy_into(self._state, torch.load(path, mmap=True, weights_only=True))


class Safetensors(_OneFile):
    """`safetensors`, which holds tensors only: numbers and lists in the state are left out."""

    suffix = ".safetensors"

    def __init__(self, state: dict[str, Any], root: Path) -> None:
        super().__init__(state, root)
        import safetensors.torch  # noqa: F401 - loaded before the baseline of the memory figure is taken

    def describe(self) -> str:
        return "safetensors.torch.save_file(tensors by dotted name, path); load_file(path), then copy_"

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        save_file(dict(named_tensors(plain(self._state))), path)

    def _read(self, path: Path) -> None:
        from safetensors.torch import load_file

        loaded = load_file(path)
        for name, tensor in named_tensors(self._state):
            tensor.copy_(loaded[name])


class TorchCheckpointing(Adapter):
    """`torch_checkpointing.CheckpointManager` with its defaults for a machine without accelerator.

    But for `use_direct_io=False`: what the default, True, writes on ext4 fails with EINVAL.
    """

    def __init__(self, state: dict[str, Any], root: Path) -> None:
        super().__init__(state, root)
        import torch_checkpointing  # noqa: F401 - loaded before the baseline of the memory figure is taken

        self._manager: CheckpointManager | None = None

    def describe(self) -> str:
        return (
            "CheckpointManager(Config(storage_config=LocalFileSystemStorageConfig(use_direct_io=False))): "
            "shared memory, staging thread, writing process; save(path, state), stall until lock() is had"
        )

    def open(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def save(self, step: int) -> Pending:
        manager = self._opened()
        path = self.path(step)
        start = time.perf_counter()
        written = manager.save(str(path), plain(self._state))
        blocked = time.perf_counter() - start

        def staged() -> None:
            with manager.lock():
                pass

        durable = synced_afterwards(lambda: written.result(WAIT_SECONDS), path)
        return Pending.until(durable, blocked=blocked, staged=staged)

    def load(self, step: int) -> None:
        self._opened().load(str(self.path(step)), into=self._state, strict=True)

    def close(self) -> None:
        self._opened().close()

    def _opened(self) -> CheckpointManager:
        assert self._manager is not None
        return self._manager


class TorchSnapshot(Adapter):
    """`torchsnapshot.Snapshot` over a gloo group of one rank.

    Without a group its `async_take` fails on a machine with IPv4 only.
    """

    def __init__(self, state: dict[str, Any], root: Path) -> None:
        super().__init__(state, root)
        import torchsnapshot  # noqa: F401 - loaded before the baseline of the memory figure is taken

    def describe(self) -> str:
        return 'Snapshot.async_take(path, {"state": StateDict(**state)}); Snapshot(path).restore(...)'

    def open(self) -> None:
        join_group(self._root)

    def save(self, step: int) -> Pending:
        from torchsnapshot import Snapshot

        path = self.path(step)
        start = time.perf_counter()
        pending = Snapshot.async_take(str(path), self._application())
        blocked = time.perf_counter() - start
        durable = synced_afterwards(pending.wait, path)
        return Pending.until(durable, blocked=blocked)

    def load(self, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(self.path(step))).restore(self._application())

    def close(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()

    def _application(self) -> dict[str, Any]:
        from torchsnapshot import StateDict

        return {"state": StateDict(**plain(self._state))}


PEERS: Mapping[str, Callable[[dict[str, Any], Path], Engine]] = {
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "torch-checkpointing": TorchCheckpointing,
    "torchsnapshot": TorchSnapshot,
}
