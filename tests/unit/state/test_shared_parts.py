"""States whose small values share their parts, so that the ways through them double with each level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async.state.containers import is_terminal
from dcp_async.state.leaves import _is_admitted
from dcp_async.sync import CheckpointEngine


def shared(times: int, value: Any, kind: type = tuple) -> Any:
    for _ in range(times):
        value = kind((value, value))
    return value


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("innermost", [1, "text", (1, 2), None])
def test_a_glance_ends_soon_at_values_that_share_their_parts(kind: type, innermost: object) -> None:
    assert not _is_admitted(shared(60, innermost, kind))


@pytest.mark.parametrize("innermost", [1, "text", (1, 2), [1], []])
def test_lists_that_share_their_parts_are_gone_over_once(innermost: object) -> None:
    assert is_terminal(shared(60, innermost, list))
    assert not is_terminal([shared(60, innermost, list), torch.ones(1)])
    assert not is_terminal([shared(60, innermost, list), [[{}]]])


def test_a_list_that_lies_in_itself_is_still_told_from_one_that_is_met_again() -> None:
    circle: list[Any] = [1]
    circle.append(circle)
    with pytest.raises(RecursionError):
        is_terminal([circle, circle])


@pytest.mark.parametrize("value", [shared(8, (1, 2)), shared(8, 1, list), (shared(8, [1], list),) * 2])
def test_honest_sharing_is_saved_and_comes_back(tmp_path: Path, value: object) -> None:
    with CheckpointEngine(tmp_path) as engine:
        engine.save({"leaf": value}, step=1)
        engine.wait()
        assert engine.read(1)["leaf"] == value
