"""``dcp-async cp``: a copy that was read back and verified before anybody sees it."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..storage import root_and_name
from .places import Place
from .progress import ProgressBar
from .terminal import Refused, common, count, printable, size_text, wants_json, write, write_json


@click.command(short_help="Copy a checkpoint, verified.")
@click.argument("source", type=Place(), metavar="SRC")
@click.argument("target", type=Place(), metavar="DST")
@common
def cp(source: str, target: str) -> None:
    """Copy the checkpoint SRC to DST; into DST, if that is a directory and no checkpoint.

    All files in its directory are copied and made durable, read back, and compared; then the copy is verified
    like by verify, and only then it appears under its name. If SRC is damaged, or this is killed half way,
    there is no copy.
    """
    for path in (source, target):
        if "://" in path and not path.startswith("file://"):
            raise Refused(f"cp copies between directories, and {path} is none")
    from .copying import copy_checkpoint  # torch, which --help can do without

    with ProgressBar("copy") as copying, ProgressBar("verify") as verifying:
        report = copy_checkpoint(_path(source), _path(target), copying, verifying)
    if wants_json():
        write_json(report)
    else:
        read = f"{count(report['num_files'], 'file')}, {size_text(report['nbytes'])}"
        write(printable(f"copied {source} to {report['target']}: {read}, verified"))


def _path(text: str) -> Path:
    return (
        Path(*root_and_name(text))
        if text.startswith("file://")
        else Path(os.path.abspath(os.path.expanduser(text)))
    )
