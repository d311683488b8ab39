"""From whatever went wrong in a save to the SaveError that its handles raise.

Invariant: DCP's CheckpointException, which derives from BaseException, never leaves the package as it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch.distributed.checkpoint.api import CheckpointException

from ..coordination import Coordinator, PhaseFailure, RemoteError, RemoteFailure
from ..errors import CheckpointExistsError, Phase, SaveCancelled, SaveError, StateMutatedError, StorageError
from ..staging import MutatedTensors


class Subject(Protocol):
    """What an error is of: a save's response, or what ``prepare`` has in its place."""

    @property
    def checkpoint_id(self) -> str: ...

    @property
    def step(self) -> int | None: ...


class Preparing:
    """What errors of ``prepare`` name in place of a checkpoint."""

    checkpoint_id = "prepare()"
    step = None


@contextmanager
def in_phase(phase: Phase) -> Iterator[None]:
    """Label whatever is raised inside."""
    try:
        yield
    except PhaseFailure:
        raise
    except (Exception, CheckpointException, SystemExit, KeyboardInterrupt) as error:
        # the last two, raised by a storage of the user's, would end the engine's loop with its saves on it
        raise PhaseFailure(phase, error) from error


def tell_others(coordinator: Coordinator, uid: str, error: BaseException) -> None:
    """Let the other ranks know that ``uid`` failed, unless one of them said it first."""
    cause = error.cause if isinstance(error, PhaseFailure) else error
    if not isinstance(cause, RemoteFailure):
        coordinator.fail(uid, "plan", error)


_DOING: dict[Phase, str] = {
    "capture": "capturing the state",
    "plan": "planning",
    "stage": "staging",
    "write": "writing",
    "commit": "committing",
}


def save_error(
    error: BaseException,
    phase: Phase,
    response: Subject,
    *,
    rank: int = 0,
    verdict: Mapping[int, RemoteError] | None = None,
) -> SaveError:
    """The error of ``response``; its cause is ``error``. ``phase`` holds unless the error knows better.

    Args:
        rank: this process's.
        verdict: what each rank failed at, where several saved; then the error is the same on all of them.
    """
    if isinstance(error, PhaseFailure):
        phase, error = error.phase, error.cause
    # stock wraps what failed: rank -> (exception, its stack)
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, RemoteFailure):
        return _common_error(verdict or error.failures, phase, response, error)
    if verdict:  # made without this rank's word, if that came too late: then it is the cause here alone
        return _common_error(verdict, phase, response, error, own=rank if rank in verdict else None)
    reason = str(error) or type(error).__name__
    cls: type[SaveError] = SaveError
    if isinstance(error, MutatedTensors):
        cls = StateMutatedError
    elif isinstance(error, FileExistsError) and not isinstance(error, StorageError):
        cls = CheckpointExistsError
    message = _message(cls, phase, response, rank, reason, reason)
    failure = cls(
        message, checkpoint_id=response.checkpoint_id, step=response.step, phase=phase, failures={rank: error}
    )
    failure.__cause__ = error
    return failure


_KINDS: dict[str, type[SaveError]] = {
    MutatedTensors.__name__: StateMutatedError,
    FileExistsError.__name__: CheckpointExistsError,
}
"""What a rank calls it -> what it is to the user."""

_PHASES: dict[str, Phase] = {"commit": "commit", "replicas": "commit"}
"""Phases of exchanges between ranks; the others belong to planning."""
_WRITING = frozenset({"after verdict", "after place", "before commit"})
"""What a rank that fell silent was at when nothing was left to agree on, and its file not complete."""


def _common_error(
    failures: Mapping[int, RemoteError],
    phase: Phase,
    response: Subject,
    cause: BaseException,
    *,
    own: int | None = None,
) -> SaveError:
    """One error for every rank: it names each rank that failed, the phase and the cause there. ``own`` is
    this rank, if ``cause`` is what it failed at."""
    # a rank that was cancelled tells nothing of why: it counts only if no other failed
    real = {rank: failure for rank, failure in sorted(failures.items()) if not failure.cancelled}
    if not real:
        return cancelled_error(response)
    (rank, first), *more = real.items()
    phase = _phase(first)
    # by the name of its class, since classes do not travel
    cls = _KINDS.get(first.type_name, SaveError)
    message = _message(cls, phase, response, rank, first.message, str(first))
    told = {first.message}
    for other, failure in more:
        if failure.message not in told:  # what concerns several ranks is said once
            told.add(failure.message)
            message += f"; and while {_DOING[_phase(failure)]} on rank {other}: {failure}"
    by_rank: dict[int, BaseException] = dict(failures)
    if own is not None:
        by_rank[own] = cause
    common = cls(
        message, checkpoint_id=response.checkpoint_id, step=response.step, phase=phase, failures=by_rank
    )
    common.__cause__ = cause
    return common


def _phase(failure: RemoteError) -> Phase:
    if failure.phase in _WRITING:
        return "write"
    own = next((phase for phase in _DOING if phase == failure.phase), None)
    return own or _PHASES.get(failure.phase.removeprefix("before "), "plan")


def _message(cls: type[SaveError], phase: Phase, response: Subject, rank: int, reason: str, told: str) -> str:
    """``reason`` is the error's own text, ``told`` that with what it is."""
    name = response.checkpoint_id
    if cls is StateMutatedError:
        return (
            f"{reason} changed while {name!r} was being staged; nothing was committed. "
            "Put the optimizer into the state, or await response.staging_completion before changing tensors, "
            "or save with overlap=False"
        )
    if cls is CheckpointExistsError:
        return f"checkpoint {name!r} exists already; save under another name, or pass replace=True"
    return f"{_verb(response)} failed while {_DOING[phase]} on rank {rank}: {told}"


def _verb(response: Subject) -> str:
    return response.checkpoint_id if isinstance(response, Preparing) else f"saving {response.checkpoint_id!r}"


def forget_locals(error: BaseException) -> None:
    """Keep an error's traceback, but not the buffers and tensors that the frames in it refer to.

    Whoever keeps a failure would otherwise keep the staging pool alive.
    """
    # causes and contexts may lead round in a circle
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


def cancelled_error(response: Subject) -> SaveCancelled:
    """The error of a save that was cancelled."""
    return SaveCancelled(
        f"{_verb(response)} was cancelled; nothing of it is left",
        checkpoint_id=response.checkpoint_id,
        step=response.step,
        phase="write",
    )
