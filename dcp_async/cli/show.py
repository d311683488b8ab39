"""``dcp-async show``: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from .places import Place, follow_links, run
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

_TENSORS = (
    Column("TENSOR", least=16),
    Column("SHAPE", drop=1, least=8),
    Column("DTYPE"),
    Column("SIZE", ">"),
    Column("CHUNKS", ">", drop=2),
)
_LEAVES = (Column("LEAF", least=16), Column("STORED", ">"))
_FILES = (Column("FILE", least=16), Column("SIZE", ">"))


@click.command(short_help="Show what a checkpoint holds.")
@click.argument("path", type=Place())
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--files", is_flag=True, help="List the data files too.")
@follow_links
@common
def show(path: str, patterns: Sequence[str], files: bool, follow_links: bool) -> None:
    """Show what the checkpoint PATH holds: tensors and other leaves with their shapes, dtypes and sizes, and
    what was noted with it.

    A PATTERN such as 'model.*' or 'optim.state' chooses names; quote it. No byte of the tensors is read.
    """
    document = run(_document(path, patterns, follow_links))
    if wants_json():
        write_json(document)
        return
    if document["tensors"]:
        rows = [
            [
                tensor["name"],
                "x".join(map(str, tensor["shape"])) or "scalar",
                tensor["dtype"],
                size_text(tensor["nbytes"]),
                str(len(tensor["chunks"])) if len(tensor["chunks"]) > 1 else "",
            ]
            for tensor in document["tensors"]
        ]
        write_table(_TENSORS, rows)
        write("")
    if document["leaves"]:
        write_table(_LEAVES, [[leaf["name"], size_text(leaf["stored_bytes"])] for leaf in document["leaves"]])
        write("")
    if files:
        write_table(_FILES, [[file["name"], size_text(file["nbytes"])] for file in document["files"]])
        write("")
    write(_summary(document))


async def _document(path: str, patterns: Sequence[str], follow_links: bool) -> dict[str, Any]:
    from .contents import contents_document  # torch, which --help can do without

    return await contents_document(path, patterns, follow_links=follow_links)


def _summary(document: dict[str, Any]) -> str:
    """Last, where it stands in sight however many tensors there are."""
    info = document["checkpoint"]
    lines = {
        "checkpoint": info["name"],
        "step": "" if info["step"] is None else str(info["step"]),
        "saved": time_text(info["time"]) if info["time"] else "",
        "by": ", ".join(
            filter(
                None,
                [
                    info["producer"],
                    info["world_size"] and count(info["world_size"], "rank"),
                    info["torch_version"] and f"torch {info['torch_version']}",
                ],
            )
        ),
        "holds": f"{count(len(document['tensors']), 'tensor')}, "
        f"{size_text(sum(tensor['nbytes'] for tensor in document['tensors']))}, "
        f"{count(len(document['leaves']), 'other leaf', 'other leaves')}",
        "files": f"{count(info['num_files'], 'data file')}, {size_text(info['nbytes'])}",
        **{f"file {name}": size_text(nbytes) for name, nbytes in info["attached"].items()},
        **{f"note {name}": str(value) for name, value in info["notes"].items()},
    }
    width = max(map(len, lines))
    return "\n".join(_field(name, text, width) for name, text in lines.items() if text)


def _field(name: str, text: str, width: int) -> str:
    return click.style(f"{printable(name):<{width}}", bold=True) + f"  {printable(text)}"
