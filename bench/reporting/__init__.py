"""What samples say: medians, ratios, tables and charts, from a run's JSON alone.

Importing this imports neither torch nor matplotlib: a report can be made where nothing can be measured.
"""

from __future__ import annotations

from .curves import SIZES, fits
from .markdown import table
from .planning_page import Case, as_json, as_markdown
from .report import readme, write_all, write_docs
from .results import Data, add, failures, new, read, write

__all__ = [
    "SIZES",
    "Case",
    "Data",
    "add",
    "as_json",
    "as_markdown",
    "failures",
    "fits",
    "new",
    "read",
    "readme",
    "table",
    "write",
    "write_all",
    "write_docs",
]
