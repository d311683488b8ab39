"""Processes for the fault tests: one zygote per session, children that never outlive their test, roots that
go.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Nursery

USUAL_KILLS = 5
FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is long, and is another case of what is short, is left to the session `faults`."""
    if config.getoption("--kills") <= USUAL_KILLS:
        left = [item for item in items if item.get_closest_marker("faults_session") is not None]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """Takes a figure that a long run shall end with: how much was looked at."""

    def tell(figure: object) -> None:
        request.config.stash.setdefault(FIGURES, []).append(f"{request.node.name}: {figure}")

    return tell


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    if config.getoption("--kills") > USUAL_KILLS:
        for figure in config.stash.get(FIGURES, []):
            terminalreporter.write_line(figure)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("zygote"))
    yield nursery
    nursery.close()


@pytest.fixture
def nursery(zygote: Nursery) -> Iterator[Nursery]:
    """Starts processes; whatever still lives when the test ends is killed by its pid."""
    yield zygote
    zygote.end_children()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """The root of the checkpoints, on a real disk; removed at once, for the kills write gigabytes."""
    path = tmp_path / "run"
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)
