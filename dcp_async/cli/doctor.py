"""``dcp-async doctor``: says by trying whether a bucket is fit for checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from ..storage import ObjectStorage
from .places import run
from .terminal import Column, Exit, common, wants_json, write_json, write_table

if TYPE_CHECKING:
    from ..storage import Finding


@click.command(short_help="Try whether a bucket is fit for checkpoints.")
@click.argument("url")
@common
def doctor(url: str) -> Exit:
    """Try what a save and a load need of the bucket URL, and say what it lacks: rights, conditional writes,
    multipart uploads, ranged reads, a rule that ends uploads which killed processes leave.

    Small objects are written below URL and removed again. Exit status 0 if saves and loads work, warnings or
    not; 1 if they would fail.
    """
    findings = run(_findings(url))
    if wants_json():
        write_json({"url": url, "findings": [asdict(finding) for finding in findings]})
    else:
        columns = (Column("LEVEL"), Column("ABOUT"), Column("WHAT", least=20, is_prose=True))
        write_table(columns, [[finding.level, finding.about, finding.text] for finding in findings])
    return Exit.DIFFERENT if any(finding.level == "error" for finding in findings) else Exit.OK


async def _findings(url: str) -> Sequence[Finding]:
    # never connected: that a bucket can't even be listed is a finding
    return await ObjectStorage(url).check()
