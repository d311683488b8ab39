"""What tells that a captured tensor was changed before it was staged."""

from __future__ import annotations

from .element_sample import FetchedSample
from .mutation_watch import MutatedTensors, MutationWatch
from .samples import Sampled

__all__ = ["FetchedSample", "MutatedTensors", "MutationWatch", "Sampled"]
