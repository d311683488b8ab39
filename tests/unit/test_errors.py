"""Errors travel: stock's ranks, and pools of processes, send each other what they raise."""

from __future__ import annotations

import pickle

import pytest

from dcp_async import (
    CheckpointError,
    CheckpointExistsError,
    CorruptCheckpointError,
    SaveError,
    StorageError,
)
from dcp_async.storage import LinkError


class Local(Exception):
    """A cause that may not exist elsewhere."""

    def __reduce__(self) -> str:
        raise pickle.PicklingError("it does not travel")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            SaveError("it failed", checkpoint_id="a", step=3, phase="write", failures={0: Local()}),
            ("checkpoint_id", "step", "phase", "message"),
        ),
        (CheckpointExistsError("it is there", checkpoint_id="a"), ("checkpoint_id", "phase")),
        (StorageError("cannot write", verb="write", path="/p", errno=28), ("verb", "path", "errno")),
        (LinkError("a link", verb="open", path="/p", errno=2), ("verb", "path", "errno")),
        (
            CorruptCheckpointError("bad", checkpoint_id="a", partially_loaded=True, tensors=("w",)),
            ("checkpoint_id", "partially_loaded", "tensors"),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_travels_whole(error: CheckpointError, told: tuple[str, ...]) -> None:
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert [getattr(twin, name) for name in told] == [getattr(error, name) for name in told]
