"""``dcp-async convert``: one format of a checkpoint into another."""

from __future__ import annotations

import os
from pathlib import Path

import click

from .places import Place, follow_links, run
from .progress import ProgressBar
from .terminal import Refused, common, printable, size_text, wants_json, write, write_json


@click.command(short_help="Write a checkpoint in another format.")
@click.argument("source", type=Place(), metavar="SRC")
@click.argument("target", type=Place(), metavar="DST")
@click.option(
    "--to",
    "form",
    type=click.Choice(["dcp", "safetensors", "torch"]),
    required=True,
    help="dcp: a checkpoint's directory; safetensors: one with model.safetensors for other programs; "
    "torch: one file of torch.save.",
)
@click.option(
    "--weights",
    metavar="NAME",
    help="With safetensors: the part that goes into such files, under names without it, as of 'model' in "
    "'model.layers.0.weight'. By default all tensors, under their whole names.",
)
@follow_links
@common
def convert(source: str, target: str, form: str, weights: str | None, follow_links: bool) -> None:
    """Write what SRC holds as DST in another format. SRC is a checkpoint, safetensors files or one of
    them, or a file of torch.save.

    Every byte is verified on the way, as far as SRC has checksums. Memory is bounded: tensors go by way of a
    file without a name beside DST, so that DST's disk needs room for them twice. DST appears whole, or
    not at all.
    """
    if weights is not None and form != "safetensors":
        raise click.UsageError("--weights goes with --to safetensors")
    if "://" in target:
        raise Refused(f"convert writes to a directory or a file, and {target} is none")
    path = Path(os.path.abspath(os.path.expanduser(target)))
    # before an hour of reading, and since a file of torch.save would be replaced
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already; nothing was written")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no directory {path.parent} to write {path.name} into; make it first"
        )
    nbytes = run(_converted(source, path, form, weights, follow_links))
    if wants_json():
        write_json({"source": source, "target": str(path), "format": form, "nbytes": nbytes})
    else:
        write(printable(f"wrote {path}: {size_text(nbytes)}"))


async def _converted(source: str, target: Path, form: str, weights: str | None, follow_links: bool) -> int:
    from .conversion import convert_to  # torch, which --help can do without

    with ProgressBar("convert") as progress:
        return await convert_to(source, target, form, weights, follow_links=follow_links, progress=progress)
