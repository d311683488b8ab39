"""The command line: what people and scripts ask of checkpoints, in a terminal and in pipes."""

from __future__ import annotations

from .app import command, main
from .terminal import Exit

__all__ = [
    "Exit",
    "command",
    "main",
]
