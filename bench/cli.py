"""What the entry points share: options, a directory for checkpoints, the exit status."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .measuring import file_system


def parser(text: str | None) -> argparse.ArgumentParser:
    """The parser of an entry point whose docstring is its help, with the option for where results go."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--out",
        type=Path,
        default=Path("bench/results"),
        help="where JSON, tables and charts go (%(default)s)",
    )
    return made


def add_directory(to: argparse.ArgumentParser) -> None:
    """Add the option for where checkpoints go."""
    to.add_argument("--dir", type=Path, help="where checkpoints go (a temporary folder of this one)")


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A directory for the checkpoints, by default below the working directory; removed at the end."""
    parent = parent or Path.cwd()
    parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="bench-tmp-", dir=parent))
    try:
        if file_system(directory) == "tmpfs":
            raise SystemExit(f"{parent} is in memory (tmpfs): nothing there is durable; give --dir on a disk")
        yield directory
    finally:
        shutil.rmtree(directory)


def exit_status(failures: Iterable[str]) -> int:
    """The exit status of a run: 1 if anything failed, which is said on standard error."""
    lines = sorted(set(failures))
    for line in lines:
        print(line, file=sys.stderr)
    return 1 if lines else 0
