"""``dcp-async rm``: removes checkpoints, what makes them ones first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ..catalog import survey
from ..storage import root_and_name
from .places import Place, no_metadata, not_a_checkpoint, run, storage_of
from .removal import Condemned, confirm, dry_run_option, entry, remove, report, yes_option
from .terminal import common


@click.command(short_help="Remove checkpoints.")
@click.argument("paths", type=Place(), nargs=-1, required=True, metavar="PATH...")
@dry_run_option
@yes_option
@common
def rm(paths: Sequence[str], dry_run: bool, yes: bool) -> None:
    """Remove the checkpoints PATH...

    What makes each of them a checkpoint goes first, so that one which is half removed is none. What somebody
    else put into its directory stays there, and is named. One that is being read is not removed.
    """
    # all of them are looked up before the first one goes
    condemned = list({root_and_name(path): run(_looked_up(path)) for path in paths}.values())
    confirm(condemned, dry_run=dry_run, yes=yes)
    entries: list[dict[str, Any]] = []
    try:
        for checkpoint in condemned:
            left = [] if dry_run else run(_removed(checkpoint.path))
            entries.append(entry(checkpoint, left))
    finally:
        # those that went before one could not
        if entries:
            report(entries, dry_run=dry_run)


async def _looked_up(path: str) -> Condemned:
    root, name = root_and_name(path)
    async with storage_of(root) as storage:
        # by the list, and not by opening it: what is damaged can be removed too, and without torch
        for row in await survey(storage, no_metadata):
            if row.stored.name == name and row.stored.committed:
                return Condemned(path, row)
    raise not_a_checkpoint(path, name)


async def _removed(path: str) -> list[str]:
    root, name = root_and_name(path)
    async with storage_of(root) as storage:
        return await remove(storage, name)
