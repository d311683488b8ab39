"""What commands print: tables for people, JSON for scripts, and the exit statuses for both.

Enters: values. Leaves: text on standard output. Invariant: nothing that a checkpoint says reaches a terminal
but as printable characters; a table is as wide as the terminal, or as its content where there is none.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Exit(enum.IntEnum):
    """Exit statuses, a promise to scripts."""

    OK = 0
    DIFFERENT = 1
    """Damage, or a difference, was found."""
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    """Not trusted, not confirmed, or something is in the way."""
    FAILED = 5
    INTERRUPTED = 130
    READER_GONE = 141
    """Whoever read standard output has closed it, as ``head`` does."""


class Refused(Exception):
    """What was asked for is not done, for a reason that its user decides on."""


class ReaderGone(Exception):
    """Nobody reads standard output any more."""


@dataclass(slots=True)
class Settings:
    """What every command can be told."""

    json: bool = False
    debug: bool = False


def common(function: F) -> F:
    """The options that every command has."""

    def settle(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        settings = context.ensure_object(Settings)
        if parameter.name == "debug" and value:
            settings.debug = True
            logging.basicConfig(level=logging.DEBUG, force=True)
        elif parameter.name == "as_json":
            settings.json = value
        # as https://no-color.org asks
        if os.environ.get("NO_COLOR"):
            context.color = False

    for option in (
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=settle, help="Log, and show tracebacks."
        ),
        click.option(
            "--json",
            "as_json",
            is_flag=True,
            expose_value=False,
            callback=settle,
            help="Print one JSON document.",
        ),
    ):
        function = option(function)
    return function


def wants_json() -> bool:
    """Whether the command that runs was told to print JSON."""
    return click.get_current_context().ensure_object(Settings).json


def write(text: str) -> None:
    """Print ``text``, all at once. Raises ReaderGone."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise ReaderGone from None


def write_json(document: Mapping[str, Any]) -> None:
    """Print ``document`` as JSON, in which a number that is not finite is null."""
    write(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def printable(text: str) -> str:
    """``text`` on one line, and without what a terminal would take for a command."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else " " if char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )


def size_text(nbytes: float) -> str:
    """``nbytes`` in three or four digits and a unit."""
    if nbytes < 1024:
        return f"{nbytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        nbytes /= 1024
        if nbytes < 1000 or unit == "PiB":
            break
    return f"{nbytes:.0f} {unit}" if nbytes >= 100 else f"{nbytes:.1f} {unit}"


def time_text(seconds: float) -> str:
    """``seconds`` of Unix time, on this machine's clock."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # no year that a calendar has
        return "?"


def count(number: int, thing: str, things: str | None = None) -> str:
    """``number`` and what it counts."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


class Column(NamedTuple):
    """How a column of a table looks."""

    title: str
    align: str = "<"
    drop: int = 0
    """Where the terminal is too narrow, those of the highest number go first; 0 stays."""
    least: int = 0
    """How narrow it may become; 0 if it must not be cut."""
    is_prose: bool = False
    """Whether it is cut at its end; a name is cut in its middle, which tells least."""


_GAP = "  "
_CUT = ".."


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` under the titles of ``columns``, cut to the terminal's width."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    write("\n".join(table_lines(columns, rows, width)))


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """The lines of a table; ``width`` is None where it may be as wide as it likes."""
    cells = [[printable(cell) for cell in row] for row in rows]
    # a column that says nothing in any row is not shown
    kept = [index for index in range(len(columns)) if not cells or any(row[index] for row in cells)]
    widths = {
        index: max(map(_width, {columns[index].title, *(row[index] for row in cells)})) for index in kept
    }
    if width is not None:
        _fit(columns, kept, widths, width)
    yield click.style(_line([column.title for column in columns], columns, kept, widths), bold=True)
    for row in cells:
        yield _line(row, columns, kept, widths)


def _fit(columns: Sequence[Column], kept: list[int], widths: dict[int, int], width: int) -> None:
    """Narrow columns, or leave them out, until ``width`` is enough: what matters least goes first."""
    natural = dict(widths)
    while True:
        over = sum(widths[index] for index in kept) + len(_GAP) * (len(kept) - 1) - width
        dropped = max(kept, key=lambda index: columns[index].drop)
        # those that stay give way once there is nothing left to drop
        for index in sorted(kept, key=lambda index: (-columns[index].drop, -widths[index])):
            may_narrow = columns[index].least and (columns[index].drop or not columns[dropped].drop)
            if over > 0 and may_narrow and widths[index] > columns[index].least:
                cut = min(over, widths[index] - columns[index].least)
                widths[index] -= cut
                over -= cut
        if over <= 0 or columns[dropped].drop == 0:
            return
        kept.remove(dropped)
        # with one column less there may be room for what was cut
        widths.update(natural)


def _line(
    cells: Sequence[str], columns: Sequence[Column], kept: Sequence[int], widths: Mapping[int, int]
) -> str:
    padded = []
    for index in kept:
        cell, width = cells[index], widths[index]
        if not cell.isascii() or len(cell) > width:  # few are: a list has thousands of rows
            cell = _cut(cell, width, 1.0 if columns[index].is_prose else 1 / 3)
            width -= _width(cell) - len(cell)
        padded.append(cell.rjust(width) if columns[index].align == ">" else cell.ljust(width))
    return _GAP.join(padded).rstrip()


def _cut(text: str, width: int, share: float) -> str:
    """``text`` in ``width`` columns: ``share`` of them for its start, the others for its end."""
    if _width(text) <= width:
        return text
    room = max(width - len(_CUT), 0)
    start = _leading(text, int(room * share))
    end = _leading(text[::-1], room - _width(start))[::-1]
    return f"{start}{_CUT}{end}"[:width]


def _leading(text: str, width: int) -> str:
    """As much of ``text`` as ``width`` columns hold."""
    if text.isascii():
        return text[:width]
    length = 0
    while length < len(text) and _width(text[: length + 1]) <= width:
        length += 1
    return text[:length]


def _width(text: str) -> int:
    """How many columns of a terminal ``text`` takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )
