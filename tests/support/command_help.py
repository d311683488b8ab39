"""Writes down what ``--help`` says of each command, for the documentation and a test that compares it.

python -m tests.support.command_help > docs/reference/cli.inc
"""

from __future__ import annotations

import sys

import click

from dcp_async.cli import command

WIDTH = 90


def helps() -> str:
    """A section for each command, sorted."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    root = click.Context(command, info_name="dcp-async", **settings)
    sections = []
    for name in sorted(command.commands):
        inner = click.Context(command.commands[name], info_name=name, parent=root)
        text = command.commands[name].get_help(inner)
        sections.append(f"### `{name}`\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    sys.stdout.write(helps())
