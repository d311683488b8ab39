"""What a SaveError says of a rank that fell silent: where in the save it was, as far as others can know."""

from __future__ import annotations

import pytest

from dcp_async.coordination.failures import RemoteFailure, silent
from dcp_async.errors import Phase
from dcp_async.response import Place, ResponseWriter
from dcp_async.save.failures import save_error

RESPONSE = ResponseWriter(
    checkpoint_id="step-1", step=1, place=Place(), cancel=lambda: None, on_own_thread=lambda: False
).response


@pytest.mark.parametrize(
    ("reached", "waited_for", "phase", "doing"),
    [
        (None, "verdict", "plan", "planning"),  # it never began
        ("verdict", "plan", "plan", "planning"),
        ("plan", "place", "plan", "planning"),
        ("leaves 2", "plan", "plan", "planning"),
        ("verdict", "open", "write", "writing"),  # it wrote under a known plan, and nobody waits for it yet
        ("place", "open", "write", "writing"),
        ("verdict", "commit", "write", "writing"),
        ("place", "commit", "write", "writing"),
        ("commit", "replicas", "commit", "committing"),
    ],
)
def test_a_silent_rank_is_said_to_be_where_it_was(
    reached: str | None, waited_for: str, phase: Phase, doing: str
) -> None:
    lost = silent(2, "has shown no sign of life for 300 s", reached, waited_for)
    error = save_error(RemoteFailure({2: lost}), "stage", RESPONSE)
    assert error.phase == phase
    assert f"failed while {doing} on rank 2: rank 2 has shown no sign of life" in str(error)
    assert list(error.failures) == [2]
