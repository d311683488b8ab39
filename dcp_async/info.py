"""What a checkpoint is and what a load did, as values.

Nothing here waits, reads or writes: whoever makes a CheckpointInfo gives it the way to its metadata.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeAlias

from .errors import LoadError

if TYPE_CHECKING:  # a list of checkpoints is told without torch
    from torch.distributed.checkpoint.metadata import Metadata

Producer: TypeAlias = Literal["dcp_async", "stock", "safetensors", "torch.save"]
"""Who wrote a checkpoint; of safetensors files nobody says who."""

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""What ``save(notes=...)`` takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A committed checkpoint, as its manifest describes it."""

    checkpoint_id: str
    """Its name: the directory under the root."""
    step: int | None
    """The step it was saved at; None if it has none."""
    time: float
    """When it was committed, in Unix seconds."""
    nbytes: int
    """Bytes of its data files."""
    num_files: int
    """How many data files it has."""
    world_size: int | None
    """How many ranks wrote it; None where the writer did not say (stock)."""
    torch_version: str | None
    """The writer's torch; None where the writer did not say (stock)."""
    producer: Producer
    """Who wrote it."""
    notes: Mapping[str, JSON] = field(default_factory=dict)
    """What the trainer attached with ``save(notes=...)``."""
    files: Mapping[str, int] = field(default_factory=dict)
    """What it attached with ``save(files=...)``: name -> length in bytes. No part of ``nbytes``."""
    _metadata: Callable[[str], Awaitable[Metadata]] = field(repr=False, compare=False)
    """Decodes ``.metadata``: tens of thousands of objects, so only when asked for."""

    async def metadata(self) -> Metadata:
        """DCP's ``Metadata`` of this checkpoint, decoded on demand."""
        return await self._metadata(self.checkpoint_id)


def plain_fields(info: CheckpointInfo) -> dict[str, Any]:
    """Everything of ``info`` but the way to its metadata, to be told to other ranks."""
    names = (part.name for part in fields(info) if part.name != "_metadata")
    # plain dicts: what travels between ranks holds no other mapping
    plain = {"notes": dict(info.notes), "files": dict(info.files)}
    return {name: getattr(info, name) for name in names} | plain


CheckpointRef: TypeAlias = "Literal['latest'] | str | os.PathLike[str] | SupportsIndex | CheckpointInfo"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did. Names are DCP's fully qualified names."""

    checkpoint_id: str
    """The checkpoint that was loaded."""
    step: int | None
    """Its step."""
    missing: tuple[str, ...] = ()
    """In the state, not in the checkpoint; left as they were (``strict=False``)."""
    unexpected: tuple[str, ...] = ()
    """In the checkpoint, below a subtree that the state names, but not in the state."""
    mismatched: tuple[str, ...] = ()
    """In both, with another shape or dtype; left as they were (``strict=False``)."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that were corrupt and passed over, newest first ("latest" only)."""
    # a mapping has no hash
    skip_reasons: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Why each of ``skipped`` was: name -> what is wrong with it, in the same words on all ranks."""
    nbytes: int = 0
    """Bytes placed into the state."""
    seconds: float = 0.0
    """Wall time of the load."""

    @property
    def next_step(self) -> int:
        """The step to go on with, ``step + 1``. Raises LoadError if the checkpoint has no step."""
        if self.step is None:
            raise LoadError(
                f"checkpoint {self.checkpoint_id!r} has no step; save with step=..., "
                "or keep a counter of your own in the state",
                checkpoint_id=self.checkpoint_id,
            )
        return self.step + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedRange:
    """Bytes of a checkpoint that are not what was saved, or can't be read."""

    file: str
    """The file, in the checkpoint's directory."""
    start: int
    stop: int
    """Bytes [start, stop) of it, as narrow as its checksums tell: 64 KiB blocks of ours, items of stock's."""
    names: tuple[str, ...]
    """The tensors and leaves that have bytes there; none where bytes lie between them, or if ``file`` is the
    one that would tell."""
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What reading all of a checkpoint has shown. Names are DCP's fully qualified names."""

    checkpoint_id: str
    """The checkpoint that was read."""
    producer: Producer
    """Who wrote it, which decides what vouches for its bytes."""
    damage: tuple[DamagedRange, ...]
    """What is damaged, by file and offset."""
    unrecorded: tuple[str, ...]
    """Tensors and leaves that were read, but whose writer recorded no checksum of their bytes: as stock does
    with ``set_crc32_options(False)``, and its compressing extensions."""
    num_files: int
    """How many files were read: data files, and what is attached."""
    foreign: tuple[str, ...] = ()
    """What else lies in its directory and is none of its files: left alone, and not read. So is a file under
    the name of an attached one that has other bytes by now; ``checkpoint.file(name)`` gives what was saved.
    Only of storages that can tell."""
    nbytes: int
    """Bytes of them that were read."""
    seconds: float
    """Wall time."""

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damage
