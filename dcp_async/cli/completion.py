"""``dcp-async completion``: what a shell needs to complete commands, options and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from .terminal import write

_VARIABLE = "_DCP_ASYNC_COMPLETE"
"""What click looks for: the shell asks by setting it."""


@click.command(short_help="Print a shell's completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options and paths.

    \b
    bash: eval "$(dcp-async completion bash)"      in ~/.bashrc
    zsh:  eval "$(dcp-async completion zsh)"       in ~/.zshrc, after compinit
    fish: dcp-async completion fish > ~/.config/fish/completions/dcp-async.fish
    """
    # the root, since it is what the shell completes: this command knows itself alone
    root = context.find_root()
    maker = get_completion_class(shell)
    assert maker is not None, "click has one for each choice"
    write(maker(root.command, {}, str(root.info_name), _VARIABLE).source())
