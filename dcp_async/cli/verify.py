"""``dcp-async verify``: reads all of a checkpoint and says what of it is damaged."""

from __future__ import annotations

from dataclasses import asdict

import click

from ..info import VerifyReport
from .places import Place, follow_links, run
from .progress import ProgressBar
from .terminal import (
    Column,
    Exit,
    common,
    count,
    printable,
    size_text,
    wants_json,
    write,
    write_json,
    write_table,
)

_COLUMNS = (
    Column("FILE", least=16),
    Column("BYTES"),
    Column("NAMES", drop=1, least=12),
    Column("WHY", drop=2, least=12, is_prose=True),
)


@click.command(short_help="Read a checkpoint and name what is damaged.")
@click.argument("path", type=Place())
@follow_links
@common
def verify(path: str, follow_links: bool) -> Exit:
    """Read all of the checkpoint PATH and name what is damaged: files, bytes, tensors.

    Exit status 0 if it is whole, 1 if it is damaged.
    """
    report = run(_verified(path, follow_links))
    if wants_json():
        write_json({"ok": report.ok, **asdict(report)})
    else:
        _print(report)
    return Exit.OK if report.ok else Exit.DIFFERENT


async def _verified(path: str, follow_links: bool) -> VerifyReport:
    from .opened import catalog_of  # torch, which --help can do without

    async with catalog_of(path, follow_links=follow_links) as (catalog, name):
        with ProgressBar("verify") as progress:
            return await catalog.verify(name, io_concurrency=2, progress=progress)


def _print(report: VerifyReport) -> None:
    if report.damage:
        rows = [
            [damage.file, f"{damage.start}-{damage.stop}", ", ".join(damage.names), damage.reason]
            for damage in report.damage
        ]
        write_table(_COLUMNS, rows)
    rate = report.nbytes / max(report.seconds, 1e-9)
    read = (
        f"{count(report.num_files, 'file')}, {size_text(report.nbytes)} read in {report.seconds:.1f} s "
        f"({size_text(rate)}/s)"
    )
    if report.ok:
        verdict = click.style("whole", fg="green")
    else:
        names = {name for damage in report.damage for name in damage.names}
        files = {damage.file for damage in report.damage}
        verdict = click.style("damaged", fg="red") + (
            f": {count(len(report.damage), 'range')} in {count(len(files), 'file')}, "
            f"{count(len(names), 'tensor or leaf', 'tensors and leaves')}"
        )
    write(f"{printable(report.checkpoint_id)}: {verdict}; {read}")
    if report.unrecorded:
        what = count(len(report.unrecorded), "tensor or leaf was", "tensors and leaves were")
        write(f"{what} read, but nothing recorded a checksum of their bytes")
    if report.foreign:
        write(printable(f"none of its files, and not read: {', '.join(report.foreign)}"))
