"""``dcp-async ls``: the checkpoints under a root."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..catalog import Listed, survey
from .places import Place, info_document, no_metadata, run, storage_of
from .terminal import (
    Column,
    common,
    count,
    printable,
    size_text,
    time_text,
    wants_json,
    write,
    write_json,
    write_table,
)

_COLUMNS = (
    Column("NAME", least=12),
    Column("STEP", ">"),
    Column("SAVED", drop=2),
    Column("SIZE", ">"),
    Column("FILES", ">", drop=4),
    Column("RANKS", ">", drop=5),
    Column("BY", drop=3),
    Column("NOTES", drop=1, least=10, is_prose=True),
)


@click.command(short_help="List the checkpoints under a root.")
@click.argument("root", type=Place())
@click.option("--all", "show_all", is_flag=True, help="Also what is not committed, and links to siblings.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="The N newest alone.")
@common
def ls(root: str, show_all: bool, last: int | None) -> None:
    """List the checkpoints under ROOT, the newest last.

    Nothing of them is opened: what is damaged inside shows in verify.
    """
    rows = run(_rows(root))
    committed = [row for row in rows if row.stored.committed]
    shown = committed[-last:] if last else committed
    if show_all:
        shown = shown + [row for row in rows if not row.stored.committed]
    # an empty list is an answer, not an error: a run may not have saved yet
    if wants_json():
        write_json({"root": root, "checkpoints": [_document(row) for row in shown]})
        return
    if shown:
        write_table(_COLUMNS, [_cells(row) for row in shown])
    nbytes = sum(row.info.nbytes for row in shown if row.info)
    what = f"{count(len(committed), 'checkpoint')}, {size_text(nbytes)}" if committed else "no checkpoints"
    # of some, the bytes of all would be a lie
    if last and len(committed) > last:
        what = f"{last} of {count(len(committed), 'checkpoint')}"
    write(printable(f"{what} in {root}{_hint(root) if not rows else ''}"))


def _hint(root: str) -> str:
    """What to say of a directory that is itself a checkpoint."""
    is_one = os.path.exists(os.path.join(root, ".metadata"))
    return f", which is one itself: dcp-async show {root}" if is_one else ""


async def _rows(root: str) -> list[Listed]:
    async with storage_of(root) as storage:
        return await survey(storage, no_metadata)


def _document(row: Listed) -> dict[str, Any]:
    unknown = {"name": row.stored.name, "time": row.stored.modified}
    return {
        **(info_document(row.info) if row.info else unknown),
        "committed": row.stored.committed,
        "alias_of": row.stored.alias_of or None,
        "problem": row.problem or None,
    }


def _cells(row: Listed) -> list[str]:
    info = row.info
    if info is None:
        alias = f"-> {row.stored.alias_of}" if row.stored.alias_of else "not committed"
        return [row.stored.name, "", time_text(row.stored.modified), "", "", "", "", row.problem or alias]
    notes = " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in info.notes.items()
    )
    return [
        info.checkpoint_id,
        "" if info.step is None else str(info.step),
        time_text(info.time),
        size_text(info.nbytes),
        str(info.num_files),
        str(info.world_size or ""),
        info.producer,
        notes,
    ]
