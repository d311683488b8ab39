"""A state that a stager of anybody's stages, before the engine or a writer sees it.

Enters: a state and an AsyncStager. Leaves: what it made, or a state that fails where it is captured.
Invariant: what a stager raises reaches the other ranks: they wait for this one's save by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Never

from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.stateful import Stateful


class Unstaged(Mapping[str, Any]):
    """In place of a state that could not be staged; whoever looks at it is told why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def _fail(self) -> Never:
        raise RuntimeError(
            f"it could not be staged: {type(self._error).__name__}: {self._error}"
        ) from self._error

    def __getitem__(self, key: str) -> Any:
        self._fail()

    def __iter__(self) -> Iterator[str]:
        self._fail()

    def __len__(self) -> int:
        self._fail()


def unstaged(error: Exception) -> Mapping[str, Any]:
    """A state that fails with ``error`` where it is captured, on all ranks."""
    return Unstaged(error)


def plain(state: Mapping[str, Any]) -> Any:
    """``state`` as the dict that parts of stock's take; one that fails stays as it is."""
    return state if isinstance(state, Unstaged) else dict(state)


def stage(stager: AsyncStager, state: Mapping[str, Any]) -> Any:
    """What ``stager`` makes of ``state``, or will: a mapping or a future. Never raises an Exception."""
    try:
        # as stock does: stagers are given what Statefuls give, and know nothing of those
        asked = {
            key: value.state_dict() if isinstance(value, Stateful) else value
            for key, value in sorted(state.items())
        }
        staged = stager.stage({key: asked[key] for key in state})
        if isinstance(staged, Mapping) and (synchronize := synchronizing(stager)) is not None:
            synchronize()
    except Exception as error:
        return unstaged(error)
    return staged


def synchronizing(stager: AsyncStager | None) -> Callable[[], object] | None:
    """What is to be called once ``stage`` has returned a state; None if nothing is."""
    if stager is None or not getattr(stager, "should_synchronize_after_execute", False):
        return None
    method = getattr(stager, "synchronize_staging", None)
    # the protocol's own does nothing, and warns that it is deprecated
    if method is None or getattr(method, "__func__", None) is AsyncStager.synchronize_staging:
        return None
    synchronize: Callable[[], object] = method
    return synchronize
