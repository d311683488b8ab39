"""`--cases N`: how many states each property is tried on; without it a small sample, the same in each run.

The option is known when this folder stands on the command line (`pytest tests/property --cases 1000`): then
the cases are drawn anew, and the seed that repeats them is printed. A plain run of all tests never sees it.
"""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck

SAMPLE = 30
SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases", type=int, metavar="N", help="how many random states tests/property tries each property on"
    )


def _cases(config: pytest.Config) -> int | None:
    value: int | None = config.getoption("--cases", None)
    return value


def pytest_configure(config: pytest.Config) -> None:
    if _cases(config) is not None:
        given = config.getoption("--hypothesis-seed", None)
        config.stash[SEED] = int(given) if given is not None else random.SystemRandom().randrange(2**32)


def pytest_report_header(config: pytest.Config) -> str | None:
    cases = _cases(config)
    if cases is None:
        return None
    return (
        f"{cases} cases a property; repeat them with --cases {cases} --hypothesis-seed={config.stash[SEED]}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every property of this folder its settings."""
    cases = _cases(config)
    settings = hypothesis.settings(
        max_examples=SAMPLE if cases is None else cases,
        derandomize=cases is None,
        deadline=None,  # machines are noisy
        database=None,  # what one run found must not depend on another
        print_blob=cases is not None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    seen: set[int] = set()
    for item in items:
        if Path(__file__).parent not in item.path.parents or not isinstance(item, pytest.Function):
            continue
        if cases is not None:
            item.add_marker(pytest.mark.timeout(120 + cases))
        if id(item.function) not in seen and hypothesis.is_hypothesis_test(item.function):
            seen.add(id(item.function))
            settings(item.function)
            if cases is not None:
                hypothesis.seed(config.stash[SEED])(item.function)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each case makes a directory of its own, and removes it."""
    return tmp_path_factory.mktemp("property")


@pytest.fixture(autouse=True)
def _checked_for_leaks(no_leaks: None) -> None:
    """Requested for its effect."""
