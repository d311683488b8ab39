"""What a checkpoint of ours tells of itself, as its manifest has it. Needs no torch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ..formats import Manifest
from ..info import CheckpointInfo

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


def info_of(
    name: str, manifest: Manifest, metadata_of: Callable[[str], Awaitable[Metadata]]
) -> CheckpointInfo:
    """What ``manifest`` says of ``name``; ``metadata_of`` serves ``CheckpointInfo.metadata()``."""
    return CheckpointInfo(
        checkpoint_id=name,
        step=manifest.step,
        time=manifest.time,
        nbytes=sum(file.nbytes for file in manifest.files),
        num_files=len(manifest.files),
        world_size=manifest.world_size,
        torch_version=manifest.torch_version,
        producer="dcp_async",
        notes=manifest.notes,
        files={entry.name: entry.nbytes for entry in manifest.attached},
        _metadata=metadata_of,
    )
