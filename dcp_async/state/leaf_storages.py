"""Pickled leaves whose tensors lie on a device: their bytes are brought to the host together, not one by one
as ``torch.save`` does, which waits for the device at each.

Enters: leaves, and a function that fetches. Leaves: reductions for the pickler, which name the device as
before and hold the host's bytes. Invariant: the item is the one that ``torch.save`` would have made.
Source: torch/serialization.py, where ``_save`` asks each storage for its device and its ``cpu()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch.storage import TypedStorage

from .wrapped import is_wrapper

Fetch = Callable[[Sequence[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]], None]
"""Copies those of flat tensors of bytes that lie on a device, each into host memory that the function makes
for it."""

_COO_PARTS = (methodcaller("_indices"), methodcaller("_values"))


class _Fetched(torch.UntypedStorage):
    """The bytes of a device's storage in host memory, which says that it is the device's."""

    origin: torch.device
    """Where it is from."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute of the class in C
        return self.origin

    def cpu(self) -> torch.UntypedStorage:
        return self  # in torch's own eyes, in C, it is host memory


class DeviceLeaves:
    """What was fetched for the leaves of one state."""

    def __init__(self, fetch: Fetch | None) -> None:
        """``fetch``: None where no device is in use."""
        self._fetch = fetch
        self._fetched: dict[int, torch.UntypedStorage] = {}
        """Address of a storage on a device -> its bytes."""

    def fetch(self, leaves: Iterable[object]) -> None:
        """Bring all storages of ``leaves`` that lie on devices to the host; raises what a device does."""
        if self._fetch is None:
            return
        storages: dict[int, torch.UntypedStorage] = {}
        for leaf in leaves:
            storages |= _storages_of(leaf)
        if not storages:
            return
        flat = [
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            for storage in storages.values()
        ]
        self._fetch(flat, self._host_memory)

    def _host_memory(self, flat: torch.Tensor) -> torch.Tensor:
        """Where the bytes of a storage on a device go."""
        storage = flat.untyped_storage()
        host = self._fetched[storage.data_ptr()] = _fetched_from(storage)
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(host)

    def reduced(self, tensor: torch.Tensor) -> Any:
        """What a pickler needs to write ``tensor``; NotImplemented for what it finds out by itself."""
        if not self._fetched:
            return NotImplemented
        # the protocol that torch.save writes
        reduction: Any = tensor.__reduce_ex__(2)  # type: ignore[no-untyped-call]
        return self._replaced(reduction)

    def _replaced(self, value: Any) -> Any:
        # a tensor's reduction holds its storage at the top, or one tuple further in for a subclass
        if type(value) is tuple:
            return tuple(map(self._replaced, value))
        if isinstance(value, TypedStorage):
            host = self._fetched.get(value._untyped_storage.data_ptr())
            if host is not None:
                typed: Any = TypedStorage
                return typed(wrap_storage=host, dtype=value.dtype, _internal=True)
        return value


def _fetched_from(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    made: Any = _Fetched(storage.nbytes())  # type: ignore[no-untyped-call]
    made.origin = storage.device
    host: torch.UntypedStorage = made
    return host


def _storages_of(leaf: object) -> dict[int, torch.UntypedStorage]:
    """Address -> storage. Empty where the leaf can't be looked at."""
    try:
        tensors = [tensor for tensor in _tensors_in(leaf) if not tensor.is_meta]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
    except Exception:  # a class's own code, or a list that holds itself: who pickles it says so by name
        return {}


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors with storages that ``value`` is pickled as, as far as containers and torch's own kinds
    go."""
    if isinstance(value, torch.Tensor):
        yield from _inner(value)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _tensors_in(entry)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _inner(tensor: Any) -> Iterator[torch.Tensor]:
    if is_wrapper(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _inner(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        # not values(), which takes coalesced ones alone
        yield from (part(tensor) for part in _COO_PARTS)
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout is torch.strided:
        yield tensor
