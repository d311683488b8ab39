"""Uses the installed package as its README says; in an environment that holds nothing else.

`use.py README`, in an empty folder and isolated (`python -I`), so that no checkout is imported instead.
"""

from __future__ import annotations

import asyncio
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dcp_async
import dcp_async.storage
import dcp_async.sync


class Loader:
    """A Stateful, as a data loader is one."""

    position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def check_names() -> None:
    for face in (dcp_async, dcp_async.sync, dcp_async.storage):
        assert face.__file__ is not None
        assert "site-packages" in face.__file__
        for name in face.__all__:
            getattr(face, name)


def run_readme(readme: Path) -> None:
    """Its lines, twice: the second run goes on where the first one ended."""
    block = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert block is not None
    for first in (0, 201):
        model, loader = torch.nn.Linear(3, 3), Loader()
        steps = []

        def train_step() -> None:
            steps.append(loader.position)  # noqa: B023 - called within this turn
            loader.position += 1  # noqa: B023

        optim = torch.optim.AdamW(model.parameters())
        names: dict[str, Any] = {"model": model, "optim": optim, "loader": loader}
        names["train_step"] = train_step
        exec(compile(block[1], str(readme), "exec"), names)
        asyncio.run(names["main"]())
        assert steps == list(range(first, 300)), (first, steps[:3])


if __name__ == "__main__":
    assert version("dcp-async") == dcp_async.__version__
    check_names()
    run_readme(Path(sys.argv[1]))
