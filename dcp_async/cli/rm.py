"""``dcp-async rm``: removes checkpoints, what makes them ones first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..catalog import Listed, survey
from ..storage import LocalStorage, Storage, root_and_name
from .places import Place, no_metadata, not_a_checkpoint, run, storage_of
from .terminal import Refused, common, count, printable, size_text, wants_json, write, write_json

_STOCK_DATA = re.compile(r"__[0-9]+_[0-9]+\.distcp")
"""What stock's writer calls its files; a storage removes only what is surely ours."""


@click.command(short_help="Remove checkpoints.")
@click.argument("paths", type=Place(), nargs=-1, required=True, metavar="PATH...")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@common
def rm(paths: Sequence[str], dry_run: bool, yes: bool) -> None:
    """Remove the checkpoints PATH...

    What makes each of them a checkpoint goes first, so that one which is half removed is none. What somebody
    else put into its directory stays there, and is named.
    """
    # all of them are looked up before the first one goes
    rows = [run(_looked_up(path)) for path in paths]
    confirm_removal([(path, row) for path, row in zip(paths, rows, strict=True)], dry_run=dry_run, yes=yes)
    removed = []
    for path, row in zip(paths, rows, strict=True):
        left = [] if dry_run else run(_removed(path))
        removed.append({"path": path, "nbytes": row.info.nbytes if row.info else None, "left": left})
    report_removal(removed, dry_run=dry_run)


def confirm_removal(rows: Sequence[tuple[str, Listed]], *, dry_run: bool, yes: bool) -> None:
    """Ask whether ``rows`` shall go, unless that is said already. Raises: Refused."""
    if dry_run or yes or not rows:
        return
    if not sys.stdin.isatty():
        raise Refused("nobody is there to confirm it: say --yes, or look with --dry-run")
    for path, row in rows:
        click.echo(f"{printable(path)}  {size_text(row.info.nbytes) if row.info else '?'}", err=True)
    if not click.confirm(f"Remove {count(len(rows), 'checkpoint')}?", err=True):
        raise Refused("nothing was removed")


def report_removal(removed: Sequence[dict[str, Any]], *, dry_run: bool) -> None:
    """Print what was removed, or would be."""
    if wants_json():
        write_json({"dry_run": dry_run, "removed": removed})
        return
    verb = "would remove" if dry_run else "removed"
    for entry in removed:
        size = "" if entry["nbytes"] is None else f" ({size_text(entry['nbytes'])})"
        left = f"; left, since it is no part of it: {', '.join(entry['left'][:5])}" if entry["left"] else ""
        write(printable(f"{verb} {entry['path']}{size}{left}"))


async def _looked_up(path: str) -> Listed:
    root, name = root_and_name(path)
    async with storage_of(root) as storage:
        for row in await survey(storage, no_metadata):
            if row.stored.name == name and row.stored.committed:
                return row
    raise not_a_checkpoint(path, name)


async def _removed(path: str) -> list[str]:
    root, name = root_and_name(path)
    async with storage_of(root) as storage:
        return await remove(storage, name)


async def remove(storage: Storage, name: str) -> list[str]:
    """Remove ``name`` from ``storage``, and tell what is left in its directory, which is somebody else's."""
    await storage.remove(name)
    if not isinstance(storage, LocalStorage):
        return []
    directory = storage.root / name
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    for file in filter(_STOCK_DATA.fullmatch, names):
        (directory / file).unlink()
    left = [file for file in names if not _STOCK_DATA.fullmatch(file)]
    if not left:
        directory.rmdir()
    return left
