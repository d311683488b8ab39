"""What suites need of stock that holds on to something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner


class CachingPlanner(DefaultSavePlanner):
    """Stock's cache of plans lives in the class, under the class's name."""

    def __init__(self) -> None:
        super().__init__(enable_plan_caching=True)


@contextmanager
def no_cached_plans() -> Iterator[None]:
    """Whatever the block caches is gone after it."""
    try:
        yield
    finally:
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(SavePlanner, f"_cached_{name}").pop(CachingPlanner.__name__, None)
