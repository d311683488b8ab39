"""Every test of the engine's behaviour is also a test that nothing leaks."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _checked_for_leaks(no_leaks: None) -> None:
    """Requested for its effect."""
