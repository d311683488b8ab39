"""The command ``dcp-async`` and its exit statuses: every error is one line, whatever raises it.

Enters: arguments. Leaves: text on standard output, one line on standard error, an exit status. Invariant:
importing this imports no torch; a command imports what it runs when it runs.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence

import click

import dcp_async

from ..errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StorageError,
    UntrustedCheckpointError,
)
from ..storage import InUseError
from .completion import completion
from .convert import convert
from .cp import cp
from .diff import diff
from .doctor import doctor
from .ls import ls
from .prune import prune
from .rm import rm
from .show import show
from .terminal import Exit, ReaderGone, Refused, Settings, printable
from .verify import verify

NAME = "dcp-async"

_STATUSES = """\b
Exit status: 0 as wished; 1 damage or a difference was found; 2 wrong usage;
3 not found; 4 refused (not trusted, not confirmed, in the way); 5 failed;
130 interrupted."""


@click.group(
    NAME,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_STATUSES,
)
@click.version_option(dcp_async.__version__, prog_name=NAME, message="%(prog)s %(version)s")
def command() -> None:
    """Look at checkpoints, check, compare, copy, convert and remove them: those of dcp_async, those that
    stock torch.distributed.checkpoint wrote, safetensors files, and files of torch.save.

    A checkpoint is named by its own directory, or by its URL.
    """


for _each_command in (ls, show, verify, diff, cp, convert, rm, prune, doctor, completion):
    command.add_command(_each_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with ``arguments``, the process's by default, and return its exit status."""
    settings = Settings()
    try:
        # not standalone: click would print errors its own way, and exit with statuses of its own
        status = command.main(arguments, prog_name=NAME, standalone_mode=False, obj=settings)
        # inside: at the interpreter's exit nobody could answer for a reader that has gone
        sys.stdout.flush()
        return int(status or Exit.OK)
    except click.ClickException as error:
        _tell(error.format_message(), error)
        return Exit.USAGE
    except click.Abort as error:
        # an end of input where an answer was asked for is no yes
        return Exit.INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else Exit.REFUSED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except (BrokenPipeError, ReaderGone):
        # what is still buffered has nowhere to go, and the interpreter's exit would complain of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.READER_GONE
    except Exception as error:
        if settings.debug:
            logging.getLogger(__name__).exception("%s", type(error).__name__)
        else:
            _tell(_text(error), None)
        return _status(error)


def _tell(message: str, usage: click.ClickException | None) -> None:
    if isinstance(usage, click.UsageError):
        if usage.ctx is not None and not usage.ctx.args and message.startswith("Usage:"):
            click.echo(message, err=True)  # no arguments at all: the help
            return
        where = usage.ctx.command_path if usage.ctx is not None else NAME
        message = f"{message} (see {where} --help)"
    click.echo(f"{NAME}: {printable(message)}", err=True)


def _text(error: Exception) -> str:
    known = isinstance(error, (dcp_async.errors.CheckpointError, OSError, Refused, ValueError, TypeError))
    text = str(error) or type(error).__name__
    return (
        text if known else f"{type(error).__name__}: {text}; this is a fault of {NAME}, see it with --debug"
    )


def _status(error: Exception) -> Exit:
    if isinstance(error, (CheckpointNotFoundError, FileNotFoundError)):
        return Exit.NOT_FOUND
    if isinstance(error, CorruptCheckpointError):
        return Exit.DIFFERENT
    if isinstance(error, (Refused, UntrustedCheckpointError, InUseError, FileExistsError)):
        return Exit.REFUSED
    if isinstance(error, StorageError):
        return Exit.NOT_FOUND if error.errno == errno.ENOENT else Exit.FAILED
    if isinstance(error, ValueError):  # of an argument: a URL that no storage serves, say
        return Exit.USAGE
    return Exit.FAILED
