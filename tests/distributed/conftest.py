"""Worlds of real processes, ended whatever happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import World
from tests.distributed.replica_agent import ReplicaAgent


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes worlds that are killed after the test."""
    with contextlib.ExitStack() as stack:

        def make(size: int, **options: Any) -> World:
            return stack.enter_context(World(size, tmp_path, **options))

        yield make


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Two ranks that all tests of a module share."""
    with World(2, tmp_path_factory.mktemp("pair"), kind=ReplicaAgent) as world:
        yield world


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Four ranks that all tests of a module share."""
    with World(4, tmp_path_factory.mktemp("four"), kind=ReplicaAgent) as world:
        yield world


@pytest.fixture(params=["asyncio", "uvloop"])
def loop_kind(request: pytest.FixtureRequest) -> str:
    """Runs the test once with each kind of loop in the processes."""
    kind: str = request.param
    return kind
