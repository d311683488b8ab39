"""Coroutines of a contract as tests that pytest runs as they are, without a plugin."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any


def promise(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The coroutine ``test``, given a connected storage, as a test that pytest runs as it is."""
    parameters = inspect.signature(test).parameters

    def run(self: Any, tmp_path: Path, **arguments: Any) -> None:
        async def connected() -> None:
            if "tmp_path" in parameters:
                arguments["tmp_path"] = tmp_path
            async with self.connected(tmp_path) as storage:
                await test(self, storage, **arguments)

        asyncio.run(connected())

    functools.update_wrapper(run, test)
    # pytest asks the signature for fixtures, and would follow the wrapped one to the storage
    del run.__wrapped__  # type: ignore[attr-defined]  # set a line above
    fixtures = dict.fromkeys(("self", "tmp_path", *(name for name in parameters if name != "storage")))
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # functions have it where it is set
        [inspect.Parameter(name, kind) for name in fixtures]
    )
    return run
