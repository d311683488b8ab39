"""How many cases the fuzz tests take."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutated", type=int, default=100, help="honest files with damage")
    parser.addoption("--generated", type=int, default=100, help="files of a grammar")
    parser.addoption("--fuzz-seed", type=int, default=0, help="of the random numbers behind them")
