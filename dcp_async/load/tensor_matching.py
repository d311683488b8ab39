"""TensorMatcher: whether what was saved under a name can be read into the state's tensor of that name.

Enters: tensors of a state, and what `.metadata` says. Leaves: entries of a Match: tensors to fill, fresh
ones, mismatches. Pure: no I/O, and nothing of the state is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from .._geometry import is_dense
from ..catalog import Contents
from ..formats import PLAIN_DTYPES
from ..options import Dtypes
from ..state import Region, Targets, empty_like, global_size
from .device_writes import DeviceWrites
from .match import Match
from .room import check_room


def fresh_tensor(
    meta: TensorStorageMetadata,
    strides: tuple[int, ...] | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    writes: DeviceWrites | None,
) -> torch.Tensor:
    """An empty tensor for what ``meta`` describes; ``writes`` makes those that are on a device."""
    dtype = dtype or meta.properties.dtype
    if writes is not None and device in writes.devices:
        return writes.empty(meta.size, dtype, strides, device)
    if strides is None:
        return torch.empty(meta.size, dtype=dtype, device=device)
    return torch.empty_strided(tuple(meta.size), strides, dtype=dtype, device=device)


def is_raw(
    meta: TensorStorageMetadata | BytesStorageMetadata, name: str, contents: Contents
) -> TypeGuard[TensorStorageMetadata]:
    """Whether ``name`` is a tensor for which an empty one can be made and filled."""
    return (
        isinstance(meta, TensorStorageMetadata)
        and meta.properties.dtype in PLAIN_DTYPES
        and meta.properties.layout is torch.strided
        and name not in contents.exotic
    )


def _is_gappy(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_contiguous()


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(step == 0 and extent > 1 for step, extent in zip(tensor.stride(), tensor.shape, strict=True))


class TensorMatcher:
    """Compares tensors by name; writes what becomes of them into ``match``."""

    def __init__(
        self, targets: Targets, contents: Contents, dtypes: Dtypes, writes: DeviceWrites | None
    ) -> None:
        self._targets = targets
        self._writes = writes
        self._parameters = {} if writes is None else targets.parameters()
        self._contents = contents
        self._dtypes = dtypes
        self._names = contents.names
        self.match = Match()

    def match_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Note whether ``tensor`` is filled in place, replaced by a fresh one, or does not fit."""
        match, meta = self.match, self._names.get(name)
        if meta is None:
            match.missing.append(name)
            return
        regions = self._regions(name, tensor)
        if (reason := self._misfit(name, tensor, regions)) is not None:
            match.mismatch(name, reason)
            # dtypes="convert" is advised only where it would help: no conversion mends a shape
            if isinstance(meta, TensorStorageMetadata) and meta.size == global_size(tensor):
                saved = meta.properties.dtype
                castable = saved != tensor.dtype and _can_cast(saved, tensor.dtype)
                castable = castable and not self._is_scaled(name)
                match.convertible = match.convertible or castable
            return
        assert isinstance(meta, TensorStorageMetadata)
        # of a DTensor this rank may have no part to ask, and a ShardedTensor refuses to be asked
        is_meta = type(tensor) is DTensor and tensor.is_meta
        # a list, no generator: this runs once for every tensor
        if not is_meta and not [region for region in regions if region.tensor.is_meta]:
            match.tensors[name] = regions
        elif name in self._targets.local:
            if type(tensor) is DTensor and is_raw(meta, name, self._contents):
                match.fresh[name] = self._fresh_shard(tensor)
            else:
                match.mismatch(
                    name, "is distributed and on the meta device; materialise it first, with to_empty()"
                )
        elif is_raw(meta, name, self._contents):
            check_room(name, meta, self._contents)
            # of the state's dtype, since whatever differs was refused above or is to be converted
            match.fresh[name] = fresh_tensor(
                meta, None, self._targets.device, tensor.dtype, writes=self._writes
            )
        else:
            match.leaves.append(name)

    def can_hold(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether what was saved as ``name`` can be read into ``tensor``."""
        return not tensor.is_meta and self._misfit(name, tensor, self._regions(name, tensor)) is None

    def is_of_one_kind(self, name: str) -> bool:
        """Whether ``name`` is a tensor both in the state and in the checkpoint, or in neither."""
        return (name in self._targets.tensors) == isinstance(self._names[name], TensorStorageMetadata)

    def take(self, wanted: Iterable[str]) -> None:
        """Have all of ``wanted`` read, into tensors of our own; an optimizer's entries are cut as their
        parameters are."""
        match, contents, writes = self.match, self._contents, self._writes
        for name in wanted:
            meta = self._names[name]
            parameter = self._targets.entries.get(name.rpartition(".")[0])
            if is_raw(meta, name, contents):
                check_room(name, meta, contents)
                if parameter is not None and global_size(parameter) == meta.size:
                    # an optimizer expects its entries where the parameter is, and cut as that is
                    match.fresh[name] = self._fresh_like(parameter, meta.properties.dtype)
                else:
                    # whoever takes it brings it to its own device
                    match.fresh[name] = fresh_tensor(
                        meta, contents.strides.get(name), self._device_for(name), writes=writes
                    )
            else:
                if (
                    isinstance(parameter, DTensor)
                    and isinstance(meta, TensorStorageMetadata)
                    and parameter.shape == meta.size
                ):
                    match.like[name] = parameter
                match.leaves.append(name)

    def _fresh_like(self, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor that lies, and is cut, as ``parameter`` is."""
        local = _local(parameter)
        device = self._writes.device_of(local) if self._writes is not None else None
        if self._writes is None or device is None:
            return empty_like(parameter, dtype)
        strides = local.stride() if is_dense(local.shape, local.stride()) else None
        made = self._writes.empty(local.shape, dtype, strides, device)
        if not isinstance(parameter, DTensor):
            return empty_like(parameter, dtype, made)
        return _cut_like(parameter, made)

    def _fresh_shard(self, tensor: DTensor) -> torch.Tensor:
        """An empty one in place of ``tensor``, which is on the meta device: cut alike, and where its mesh
        is."""
        kind, local = tensor.device_mesh.device_type, tensor.to_local()
        devices = self._writes.devices if self._writes is not None else ()
        device = next((device for device in devices if device.type == kind), torch.device("cpu"))
        meta = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), local.shape, [])
        return _cut_like(tensor, fresh_tensor(meta, None, device, writes=self._writes))

    def _device_for(self, name: str) -> torch.device:
        """Where to make what somebody takes as it was saved, and brings to where it shall be: there at once
        if it is an optimizer's, which has its entries where their parameters are."""
        entry, _, key = name.rpartition(".")
        # step counts stay in host memory unless saved options, not read yet, say otherwise
        if self._writes is None or key == "step" or (parameter := self._parameters.get(entry)) is None:
            return torch.device("cpu")
        return self._writes.device_of(_local(parameter)) or torch.device("cpu")

    def _misfit(self, name: str, tensor: torch.Tensor, regions: Iterable[Region]) -> str | None:
        """Why what was saved as ``name`` can't be read into ``tensor``, of which ``regions`` lie here."""
        meta = self._names[name]
        if not isinstance(meta, TensorStorageMetadata):
            return "is a tensor in the state, but not in the checkpoint"
        saved = meta.properties.dtype
        size = global_size(tensor)
        if saved != tensor.dtype and self._is_scaled(name):
            return (
                f"is {saved} in blocks with scales of their own ({name}_scale_inv), without which its "
                f"values are wrong; dequantize={tensor.dtype} makes them plain"
            )
        if meta.size != size or (saved != tensor.dtype and self._dtypes == "exact"):
            return f"is {_shown(tensor)} in the state, {tuple(meta.size)} {saved} in the checkpoint"
        if saved != tensor.dtype and not _can_cast(saved, tensor.dtype):
            return f"is {_shown(tensor)} in the state; {saved}, as in the checkpoint, can't become that"
        for region in regions:
            if _is_gappy(region.tensor):
                # noted in passing: strides are asked here anyway, and looking for aliases needs it
                self.match.gappy.add(name)
                if _is_expanded(region.tensor):
                    return "is expanded: its elements share one place; clone() it first"
        return None

    def _is_scaled(self, name: str) -> bool:
        """Whether it is quantised as Hugging Face's block-wise FP8 is."""
        return f"{name}_scale_inv" in self._names

    def _regions(self, name: str, tensor: torch.Tensor) -> list[Region]:
        # what lies here is asked, not the tensor itself: a ShardedTensor has few answers
        local = self._targets.local
        return local[name] if name in local else [Region.whole(tensor)]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What lies here of a tensor, if it is a distributed one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _cut_like(tensor: DTensor, local: torch.Tensor) -> DTensor:
    """``local`` as this rank's part of a tensor that is cut as ``tensor`` is."""
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,  # a check is a collective, and a load must run none
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _shown(tensor: torch.Tensor) -> str:
    return f"{tuple(global_size(tensor))} {tensor.dtype}"


def _can_cast(saved: object, dtype: torch.dtype) -> bool:
    """Whether ``saved``, which a newer torch may have and this one not, can become ``dtype``."""
    return isinstance(saved, torch.dtype) and torch.can_cast(saved, dtype)
