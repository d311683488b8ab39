"""What runs in each rank of a world that goes through torch's documented names.

Enters: a directory. Leaves: how each case ended, as text.
"""

from __future__ import annotations

import traceback

from tests.distributed.agent import Agent
from tests.support.documented_names import CASES


class NamesAgent(Agent):
    """All cases, one after another."""

    async def go_through(self, root: str) -> dict[str, str]:
        """Case -> what it raised, of those that did."""
        failed = {}
        for case in dict.fromkeys(CASES.values()):
            try:
                await case(f"{root}/{case.__name__}")
            except Exception:  # told whole, so that one that fails hides no other
                failed[case.__name__] = traceback.format_exc()
        return failed
