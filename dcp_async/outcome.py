"""From whatever went wrong in a save to the SaveError that its handles raise.

Invariant: DCP's CheckpointException, which derives from BaseException, never leaves the package as it is.
"""

from __future__ import annotations

import traceback

from torch.distributed.checkpoint.api import CheckpointException

from .errors import CheckpointExistsError, Phase, SaveCancelled, SaveError, StateMutatedError, StorageError
from .remote import PhaseFailure, RemoteFailure
from .response import AsyncSaveResponse
from .staging import MutatedTensors

_DOING: dict[Phase, str] = {
    "capture": "capturing the state",
    "plan": "planning",
    "stage": "staging",
    "write": "writing",
    "commit": "committing",
}


def save_error(
    error: BaseException, phase: Phase, response: AsyncSaveResponse, *, rank: int = 0
) -> SaveError:
    """The error of ``response``; its cause is ``error``. ``phase`` holds unless the error knows better."""
    if isinstance(error, PhaseFailure):
        phase, error = error.phase, error.cause
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, RemoteFailure):
        return _remote_error(error, phase, response)
    name = response.checkpoint_id
    cls: type[SaveError] = SaveError
    reason = str(error) or type(error).__name__
    message = f"saving {name!r} failed while {_DOING[phase]} on rank {rank}: {reason}"
    if isinstance(error, MutatedTensors):
        cls = StateMutatedError
        message = (
            f"{error} changed while {name!r} was being staged; nothing was committed. "
            "Put the optimizer into the state, or await response.staging_completion before changing tensors, "
            "or save with overlap=False"
        )
    elif isinstance(error, FileExistsError) and not isinstance(error, StorageError):
        cls = CheckpointExistsError
        message = f"checkpoint {name!r} exists already; save under another name, or pass replace=True"
    made = cls(message, checkpoint_id=name, step=response.step, phase=phase, failures={rank: error})
    made.__cause__ = error
    return made


_KINDS: dict[str, type[SaveError]] = {
    MutatedTensors.__name__: StateMutatedError,
    FileExistsError.__name__: CheckpointExistsError,
}
"""What another rank calls it -> what it is here."""


def _remote_error(error: RemoteFailure, phase: Phase, response: AsyncSaveResponse) -> SaveError:
    """The same error on every rank: it names the rank, the phase and the cause there."""
    name = response.checkpoint_id
    if all(failure.cancelled for failure in error.failures.values()):
        return cancelled_error(response)
    rank, first = next(
        (rank, failure) for rank, failure in sorted(error.failures.items()) if not failure.cancelled
    )
    if first.phase in _DOING:
        phase = first.phase
    made = _KINDS.get(first.type_name, SaveError)(
        f"saving {name!r} failed while {_DOING[phase]} on rank {rank}: {first}",
        checkpoint_id=name,
        step=response.step,
        phase=phase,
        failures=dict(error.failures),
    )
    made.__cause__ = error
    return made


def forget_locals(error: BaseException) -> None:
    """Keep an error's traceback, but not the buffers and tensors that the frames in it refer to.

    Whoever keeps a failure would otherwise keep the staging pool alive.
    """
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        link = todo.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        todo += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            todo += link.exceptions
        elif isinstance(link, PhaseFailure):
            todo.append(link.cause)


def cancelled_error(response: AsyncSaveResponse) -> SaveCancelled:
    """The error of a save that was cancelled."""
    return SaveCancelled(
        f"saving {response.checkpoint_id!r} was cancelled; nothing of it is left",
        checkpoint_id=response.checkpoint_id,
        step=response.step,
        phase="write",
    )
