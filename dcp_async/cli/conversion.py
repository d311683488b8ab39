"""Opens what is to be converted, and has it written anew.

Enters: a path. Leaves: a checkpoint or a file. Invariant: what was opened is closed, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..formats import DISTCP, SafetensorsFormat
from ..interop import rewrite, write_torch_save
from ..trust import Trust
from .opened import catalog_of, refuse_damaged
from .places import IO_CONCURRENCY

_BUDGET_BYTES = 256 << 20


async def convert_to(
    source: str,
    target: Path,
    form: str,
    weights: str | None,
    *,
    follow_links: bool,
    progress: Callable[[int, int], None],
) -> int:
    """Write what ``source`` holds as ``target``; how many bytes that takes. Raises: as for reading and
    saving."""
    trust = Trust(follow_links=follow_links)
    async with catalog_of(source, follow_links=follow_links) as (catalog, name):
        contents = await catalog.open(name)
        try:
            if contents.info.producer == "torch.save":
                # its checksums are of storages, which reading a tensor does not compare
                report = await catalog.verify(name, io_concurrency=IO_CONCURRENCY)
                refuse_damaged(source, report, "nothing was written")
            if form != "torch":
                info = await rewrite(
                    contents,
                    target,
                    trust=trust,
                    budget_bytes=_BUDGET_BYTES,
                    progress=progress,
                    format=DISTCP if form == "dcp" else SafetensorsFormat(weights),
                )
                return info.nbytes
            await write_torch_save(
                contents, target, trust=trust, budget_bytes=_BUDGET_BYTES, progress=progress
            )
            return target.stat().st_size  # noqa: ASYNC240 - the command ends here
        finally:
            await contents.close()
