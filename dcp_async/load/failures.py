"""What a load raises: from what went wrong inside of it to an error of the tree that says what to do.

Enters: exceptions of the stages, of storages, of the trainer's objects. Leaves: errors of the tree, which say
whether targets were touched and which tensors are concerned. Invariant: what ends a program or a task stays
itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from .._concurrency import first_failure
from .._foreign import ENDINGS, FillError, is_foreign, words
from .._geometry import CoverageError
from ..catalog import Contents
from ..coordination import RemoteFailure
from ..errors import CorruptCheckpointError, IncompatibleStateError, LoadError, UntrustedCheckpointError
from ..formats import UnsupportedError
from ..trust import UntrustedGlobal

_MAX_NAMES = 5
"""So many tensors are named in a message."""


class DamagedError(ValueError):
    """A checkpoint contradicts itself; ``names`` are the tensors concerned."""

    def __init__(
        self, message: str, names: Sequence[str], *, file: str = "", ranges: Sequence[tuple[int, int]] = ()
    ) -> None:
        """``ranges``: bytes of ``file`` that are bad, whatever else lies there."""
        super().__init__(message)
        self.names = tuple(names)
        self.file = file
        self.ranges = ranges


class LoadFailures:
    """Explains what goes wrong while one checkpoint is loaded."""

    def __init__(self, contents: Contents, *, touched: bool) -> None:
        """``touched``: targets hold bytes of another checkpoint, which was corrupt."""
        self._contents = contents
        self._name = contents.info.checkpoint_id
        self.touched = touched
        """Whether a target may hold other bytes than before the load."""

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Around stages of a load: the first failure in them is raised as an error of the tree."""
        try:
            yield
        except ENDINGS:
            raise
        except BaseException as error:  # what it reads into, and what reads, may be the trainer's own
            cause = first_failure(error)
            told = self.explain(cause)
            if told is cause:
                raise cause from None  # the group around it tells the user nothing
            raise told from cause

    def explain(self, error: BaseException) -> BaseException:
        """The error of the tree for ``error``, or itself if it is nobody's fault here."""
        name = self._name
        state = "targets are partly overwritten" if self.touched else "nothing was loaded"
        if isinstance(error, UntrustedGlobal):
            short = error.name.rpartition(".")[2]
            narrow = f"it with Trust(safe_globals=({short},)), or " if error.allowable else ""
            return UntrustedCheckpointError(
                f"checkpoint {name!r}: a leaf names {error.name}; {state}. If you trust it, allow "
                f"{narrow}anything with Trust(unsafe=True)",
                checkpoint_id=name,
            )
        if isinstance(error, CoverageError):
            return self._uncovered(error, state)
        if isinstance(error, DamagedError):
            return self._damaged(error, state)
        if isinstance(error, (UnsupportedError, FillError)):
            return LoadError(f"checkpoint {name!r}: {error}; {state}", checkpoint_id=name)
        if is_foreign(error) and not isinstance(
            error, (OSError, MemoryError, RemoteFailure)
        ):  # those know no culprit
            return LoadError(
                f"checkpoint {name!r}: reading it failed ({words(error)}); {state}", checkpoint_id=name
            )
        return error

    def _uncovered(self, error: CoverageError, state: str) -> LoadError:
        name = self._name
        if self._contents.is_merged:
            # each rank of stock's wrote its own metadata, and one is missing
            return CorruptCheckpointError(
                f"checkpoint {name!r} is not whole: {error}; {state}. Load an older checkpoint",
                checkpoint_id=name,
                partially_loaded=self.touched,
            )
        return IncompatibleStateError(f"checkpoint {name!r}: {error}; {state}", checkpoint_id=name)

    def _damaged(self, error: DamagedError, state: str) -> CorruptCheckpointError:
        names = tuple(dict.fromkeys((*error.names, *self._names_in(error.file, error.ranges))))
        more = " and more" if len(names) > _MAX_NAMES else ""
        what = f" (in {', '.join(names[:_MAX_NAMES])}{more})" if names else ""
        return CorruptCheckpointError(
            f"checkpoint {self._name!r} is corrupt: {error}{what}; {state}. Load an older checkpoint",
            checkpoint_id=self._name,
            partially_loaded=self.touched,
            tensors=names,
        )

    def _names_in(self, file: str, ranges: Iterable[tuple[int, int]]) -> list[str]:
        """Whose items overlap these bytes, wanted or not: a block is damaged for all that lies in it."""
        # over all items: only a load that has failed pays for it
        return [
            name
            for (name, _), (stored_in, offset, length) in self._contents.locations.items()
            if stored_in == file and any(offset < high and low < offset + length for low, high in ranges)
        ]
