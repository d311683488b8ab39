"""Tests for other people's test suites: what proves a storage of theirs; needs pytest."""

from __future__ import annotations

import pytest

# an `assert` outside of a test module says nothing of its values unless pytest is told before it is imported
pytest.register_assert_rewrite(f"{__name__}.saves", f"{__name__}.storage_contract")

from .storage_contract import StorageContract  # noqa: E402  # after the line above

__all__ = ["StorageContract"]
