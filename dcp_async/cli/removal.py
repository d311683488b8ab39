"""What ``rm`` and ``prune`` have in common: they look first, ask, remove, and tell what was removed.

Enters: checkpoints of one or more roots. Leaves: storages without them. Invariant: nothing goes that was not
named, to somebody who could say no, before the first one went.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ..catalog import Listed
from ..storage import InUseError, LocalStorage, Storage
from .terminal import Refused, count, printable, size_text, wants_json, write, write_json

dry_run_option = click.option(
    "--dry-run", "-n", is_flag=True, help="Say what would be removed, and remove nothing."
)
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@dataclass(frozen=True, slots=True)
class Condemned:
    """A checkpoint that is to go."""

    path: str
    row: Listed

    @property
    def nbytes(self) -> int | None:
        """What it takes; None if it does not say so itself."""
        return self.row.info.nbytes if self.row.info else None


def confirm(condemned: Sequence[Condemned], *, dry_run: bool, yes: bool) -> None:
    """Ask whether all of them shall go, unless that is said already. Raises: Refused."""
    if dry_run or yes or not condemned:
        return
    # a script that nobody watches must have said so, or it would wait for an answer for ever
    if not sys.stdin.isatty():
        raise Refused("nobody is there to confirm it: say --yes, or look with --dry-run")
    for checkpoint in condemned:
        size = "?" if checkpoint.nbytes is None else size_text(checkpoint.nbytes)
        # standard output is for what was removed
        click.echo(f"{printable(checkpoint.path)}  {size}", err=True)
    if not click.confirm(f"Remove {count(len(condemned), 'checkpoint')}?", err=True):
        raise Refused("nothing was removed")


async def remove(storage: Storage, name: str) -> list[str]:
    """Remove ``name`` from ``storage``, and tell what is left in its directory, which is somebody else's.

    Raises: InUseError if it is being read; StorageError.
    """
    await storage.remove(name, unless_read=True)
    if not isinstance(storage, LocalStorage):
        return []
    try:
        return sorted(os.listdir(storage.root / name))
    except FileNotFoundError:
        return []


def entry(
    checkpoint: Condemned, left: Sequence[str] = (), why_kept: InUseError | None = None
) -> dict[str, Any]:
    """What became of one, as a JSON document has it."""
    return {
        "path": checkpoint.path,
        "nbytes": checkpoint.nbytes,
        "left": list(left),
        "kept": None if why_kept is None else str(why_kept),
    }


def report(entries: Sequence[dict[str, Any]], *, dry_run: bool, **more: Any) -> None:
    """Print what was removed, or would be; ``more`` goes into the JSON document."""
    if wants_json():
        write_json({"dry_run": dry_run, "removed": entries, **more})
        return
    verb = "would remove" if dry_run else "removed"
    for removed in entries:
        if removed["kept"]:
            write(printable(f"kept {removed['path']}: {removed['kept']}"))
            continue
        size = "" if removed["nbytes"] is None else f" ({size_text(removed['nbytes'])})"
        left = (
            f"; left, since it is no part of it: {', '.join(removed['left'][:5])}" if removed["left"] else ""
        )
        write(printable(f"{verb} {removed['path']}{size}{left}"))
