"""Servers of buckets, one of each kind for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.buckets import Seaweed, Server, moto_server, seaweed_server


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path_factory.mktemp("seaweed") / "run") as seaweed:
        yield seaweed


@pytest.fixture(scope="session")
def seaweed(weed: Seaweed) -> Server:
    """A real server, which tests leave running."""
    return weed.server


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    with moto_server() as server:
        yield server


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A prefix of the bucket that no other test has."""
    return tmp_path.as_posix().strip("/")
