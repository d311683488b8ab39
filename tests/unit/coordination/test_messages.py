"""Messages between ranks are plain data on the wire, and themselves again behind it."""

from __future__ import annotations

from typing import Any

import pytest

from dcp_async.coordination.failures import RemoteError
from dcp_async.coordination.messages import (
    Answer,
    Busy,
    Contribution,
    Failed,
    FailureReport,
    Goodbye,
    Left,
    Missed,
    Settled,
    Stopped,
    ToCoordinator,
    ToRank,
    from_plain,
    to_plain,
)
from dcp_async.trust import dumps, loads

MESSAGES: list[ToCoordinator | ToRank] = [
    Contribution(rank=1, uid="u", phase="plan", ordinal=None, name="", value={"failures": {1: ("a",)}}),
    Busy(rank=1, text="Model.state_dict()", seconds=2.5),
    Stopped(rank=1, uid="u", flag=True),
    Goodbye(rank=1, unread=None),
    Answer(uid="u", phase="plan", answer=[None, 1.5, b"\xff"]),
    Missed(ordinal=3, name="step-3"),
    Left(reason="rank 0, the coordinator, closed its engine"),
]
WITH_FAILURES: list[type[FailureReport] | type[Failed] | type[Settled]] = [FailureReport, Failed, Settled]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: ToCoordinator | ToRank) -> None:
    assert from_plain(loads(dumps(to_plain(message)))) == message


@pytest.mark.parametrize("kind", WITH_FAILURES)
def test_failures_survive_the_wire(kind: Any) -> None:
    error = RemoteError(phase="write", type_name="OSError", message="disk full", tensors=("a", "b"))
    more: dict[type, dict[str, Any]] = {FailureReport: {"reporter": 2}, Failed: {}, Settled: {"flag": True}}
    message = kind(uid="u", failures={2: error}, **more[kind])
    read: Any = from_plain(loads(dumps(to_plain(message))))
    assert type(read) is kind
    assert read.failures[2].plain() == error.plain()
    assert {name: getattr(read, name) for name in more[kind]} == more[kind]


@pytest.mark.parametrize("data", [("unheard of", 1), ("goodbye", 1), ("goodbye", 1, 2, 3)])
def test_what_is_no_message_is_refused(data: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="not a message between ranks"):
        from_plain(data)
