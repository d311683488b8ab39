"""``dcp-async``, and ``python -m dcp_async``: says what to install where the command line's libraries are
missing.

Enters: the process's arguments. Leaves: its exit status. Invariant: torch is not imported here.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line, and return the exit status."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        # of any other module it is no matter of the extra: the traceback tells more
        if error.name not in ("click", "rich"):
            raise
        sys.stderr.write(f"dcp-async: {error.name} is not installed: pip install 'dcp-async[cli]'\n")
        return 2
    except KeyboardInterrupt:  # while it starts; later ones are the command's own to end by
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
