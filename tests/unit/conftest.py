"""Hypothesis for pure code: seeded, so that a red run can be repeated; no deadline, because machines are
noisy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("seeded", deadline=None, derandomize=True)
settings.load_profile("seeded")
