"""Whether the bytes of a checkpoint suffice for the tensors that its metadata promises.

Enters: an opened checkpoint's contents, and a tensor that memory is about to be made for. Leaves: nothing, or
CorruptCheckpointError. Invariant: no memory is asked for on the word of `.metadata` or a manifest alone.
"""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .._geometry import is_dense
from ..catalog import Contents
from ..errors import CorruptCheckpointError


def check_room(name: str, meta: TensorStorageMetadata, contents: Contents) -> None:
    """Raises CorruptCheckpointError if the items of ``name`` are shorter than its elements, or if its strides
    are not those of a tensor without gaps."""
    # what lay inside of a leaf was read whole; what is quantised has as many numbers as its file holds
    if contents.unfolded_leaf(name) is not None or name in contents.quantised:
        return
    wanted, held = meta.size.numel() * meta.properties.dtype.itemsize, 0
    for chunk in meta.chunks:
        key = (name, chunk.offsets)
        if key in contents.transforms or meta.properties.layout is not torch.strided:
            held = wanted  # compressed: its bound is known when it is inflated
        elif (location := contents.locations.get(key)) is not None:
            held += location[2]
    # with gaps between its elements a small tensor would ask for any amount of memory
    strides = contents.strides.get(name)
    if held < wanted or (
        strides is not None and (len(strides) != len(meta.size) or not is_dense(meta.size, strides))
    ):
        what = f"{held} bytes for its {wanted}" if held < wanted else "unusual strides"
        raise CorruptCheckpointError(
            f"checkpoint {contents.info.checkpoint_id!r}: {name} has {what}; load an older checkpoint",
            checkpoint_id=contents.info.checkpoint_id,
            tensors=(name,),
        )
