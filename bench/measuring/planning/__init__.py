"""What planning costs with many ranks: the steps of a save that are about planning, timed one by one.

In: a layout and a number of ranks. Out: seconds of CPU by step, and bytes. Each step runs once per rank, or
once on the coordinator over what all ranks sent. Nothing travels and nothing is written: serialisation is in.
"""

from __future__ import annotations

from .clock import Times
from .ours import run_ours
from .simulated_ranks import LAYOUTS, NUM_LEAVES, Ranks
from .stock import run_stock
from .store import store_seconds

__all__ = ["LAYOUTS", "NUM_LEAVES", "Ranks", "Times", "run_ours", "run_stock", "store_seconds"]
