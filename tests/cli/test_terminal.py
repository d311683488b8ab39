"""How it looks and how it ends: tables, statuses, errors of one line, in a real terminal and in pipes."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dcp_async.cli import Exit, command
from dcp_async.cli.terminal import Column, printable, size_text, table_lines
from tests.cli.conftest import Run, step
from tests.support.command_help import helps
from tests.support.doubles import data_files

COLUMNS = (
    Column("NAME", least=8),
    Column("STEP", ">"),
    Column("WHEN", drop=2),
    Column("NOTES", drop=1, least=6),
)
ROWS = [["a-rather-long-name", "1", "yesterday", "some words of prose"], ["b", "20", "", "x"]]


def lines(width: int | None) -> list[str]:
    return [re.sub("\x1b\\[[0-9;]*m", "", line) for line in table_lines(COLUMNS, ROWS, width)]


def test_a_table_is_as_wide_as_its_content() -> None:
    assert lines(None) == [
        "NAME                STEP  WHEN       NOTES",
        "a-rather-long-name     1  yesterday  some words of prose",
        "b                     20             x",
    ]


@pytest.mark.parametrize("width", range(14, 60))
def test_a_table_fits_the_terminal_and_keeps_its_first_columns(width: int) -> None:
    table = lines(width)
    assert all(len(line) <= width for line in table)
    assert all("NAME" in line and "STEP" in line for line in table[:1])
    assert table[2].startswith("b")


def test_a_column_that_says_nothing_is_left_out() -> None:
    assert next(iter(table_lines(COLUMNS, [["a", "1", "", ""]], None))).count("  ") == 1


def test_nothing_that_a_checkpoint_says_commands_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb c\\u202e"
    _, row = table_lines(COLUMNS, [["\x1b]0;", "", "", ""]], 30)
    assert "\x1b" not in row


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1023 << 20, "1.0 GiB"), (150 << 30, "150 GiB")],
)
def test_sizes_have_few_digits(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["ls", "/nowhere/at/all"], Exit.NOT_FOUND),
        (["ls", "nosuch://bucket/run"], Exit.USAGE),
        (["show", "/nowhere/at/all"], Exit.NOT_FOUND),
        (["verify"], Exit.USAGE),
        (["frobnicate"], Exit.USAGE),
        (["ls", ".", "--last", "0"], Exit.USAGE),
        (["cp", "memory://a/b", "."], Exit.REFUSED),
    ],
)
def test_an_error_is_one_line_and_a_status(run: Run, arguments: Sequence[str], status: Exit) -> None:
    ran = run(*arguments)
    assert ran.status == status
    assert ran.out == ""
    assert ran.err.startswith("dcp-async: ")
    assert ran.err.count("\n") == 1


def test_a_directory_of_runs_is_no_checkpoint(run: Run, runs: Path) -> None:
    ran = run("verify", runs)
    assert ran.status == Exit.NOT_FOUND
    assert "it is a directory of checkpoints" in ran.err


def test_a_link_out_of_the_root_is_followed_when_told_so(run: Run, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (file,) = data_files(runs / step(1))
    file.rename(tmp_path / "elsewhere" / file.name)
    file.symlink_to(tmp_path / "elsewhere" / file.name)
    assert run("verify", runs / step(1)).status == Exit.REFUSED
    assert run("verify", "--follow-links", runs / step(1)).status == Exit.OK


def test_every_command_has_help_and_the_common_options(run: Run) -> None:
    assert run("--help").status == 0
    for name in command.commands:
        ran = run(name, "--help")
        assert ran.status == 0
        assert name == "completion" or "--json" in ran.out


def test_the_documentation_has_what_help_says() -> None:
    assert (Path(__file__).parents[2] / "docs/reference/cli.inc").read_text() == helps(), (
        "python -m tests.support.command_help > docs/reference/cli.inc"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(run: Run, shell: str) -> None:
    assert "_DCP_ASYNC_COMPLETE" in run("completion", shell).out


def test_an_interrupt_ends_it_with_130(run: Run, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dcp_async.cli.copying._read_back", interrupt)
    assert run("cp", runs / step(1), runs / "copy").status == Exit.INTERRUPTED
    assert not [entry for entry in os.listdir(runs) if "copy" in entry]


def spawn(*arguments: str | Path, python: Sequence[str] = ("-m", "dcp_async")) -> list[str]:
    return [sys.executable, *python, *map(str, arguments)]


def test_a_list_needs_no_torch(runs: Path) -> None:
    code = (
        "import sys; from dcp_async.__main__ import main; statuses = [main(), ('torch' in sys.modules)];"
        "sys.exit(statuses != [0, False])"
    )
    for arguments in (["ls", str(runs)], ["--version"], ["rm", "--dry-run", str(runs / step(1))]):
        subprocess.run(spawn(*arguments, python=("-c", code)), check=True, stdout=subprocess.DEVNULL)


def test_a_missing_extra_is_said_in_one_line() -> None:
    code = "import sys; sys.modules['click'] = None; from dcp_async.__main__ import main; sys.exit(main())"
    ended = subprocess.run(spawn("ls", python=("-c", code)), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "dcp-async: click is not installed: pip install 'dcp-async[cli]'\n"


def test_a_reader_that_leaves_is_no_fault(runs: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(spawn("ls", runs), stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (Exit.READER_GONE, "")


def in_terminal(*arguments: str | Path, **environment: str) -> str:
    """What a terminal of 50 columns shows of a command."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        spawn(*arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "50", "TERM": "xterm", **environment},
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return shown.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colours_and_its_width(runs: Path) -> None:
    shown = in_terminal("ls", runs)
    assert "\x1b[1m" in shown
    assert all(len(line) <= 50 for line in re.sub("\x1b\\[[0-9;]*m", "", shown).splitlines()[:-1])
    assert "\x1b" not in in_terminal("ls", runs, NO_COLOR="1")
