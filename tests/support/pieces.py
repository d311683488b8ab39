"""A distributed tensor of whatever pieces, with DCP's hooks and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, shape)."""


class Pieces(torch.Tensor):
    """A distributed tensor that has DCP's hooks and nothing else: what ``boxes`` say lies here."""

    _boxes: Sequence[Box]
    _whole: torch.Tensor

    @staticmethod
    def of(whole: torch.Tensor, boxes: Sequence[Box]) -> Pieces:
        """The pieces of ``whole`` at ``boxes``, each (offsets, shape)."""
        made = whole.as_subclass(Pieces)
        made._boxes, made._whole = boxes, whole
        return made

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), torch.Size(shape)) for at, shape in self._boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        offsets = index.offset
        assert offsets is not None
        shape = next(shape for at, shape in self._boxes if at == tuple(offsets))
        where = tuple(slice(low, low + extent) for low, extent in zip(offsets, shape, strict=True))
        return self._whole[where].clone()

    def __create_write_items__(self, fqn: str, whole: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(self._whole),
                    size=self._whole.size(),
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]
