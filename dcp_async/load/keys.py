"""Keys of the mappings that were saved: plain ones as they are, pickled ones of their class if it is trusted.

Enters: keys of a saved tree. Leaves: keys for a dict, or an error of the tree. Invariant: what a dict costs
is bounded, however a checkpoint chose its keys' hashes.
"""

from __future__ import annotations

from typing import Any

from ..formats import PickledKey
from ..trust import MAX_ALIKE, Trust, UntrustedGlobal, load_pickle
from .failures import DamagedError, LoadFailures


class Keys:
    """Makes the keys of one checkpoint's mappings."""

    def __init__(self, trust: Trust, failures: LoadFailures) -> None:
        self._trust = trust
        self._failures = failures
        self._pickles: dict[int, set[bytes]] = {}
        """Hash of a key -> the pickles of such keys."""

    def unpickle(self, key: PickledKey) -> Any:
        """A key of a mapping, of its class if that is trusted.

        Raises: UntrustedCheckpointError, CorruptCheckpointError.
        """
        if key.raw is None:
            return key.plain
        try:
            value = load_pickle(key.raw, self._trust)
            # counted by pickles: comparing the keys themselves is the very cost that is bounded
            alike = self._pickles.setdefault(hash(value), set())
            alike.add(key.raw)
            if len(alike) > MAX_ALIKE:
                raise ValueError("too many hash alike")
        except UntrustedGlobal as error:
            # of a kind of str or int, say: not being trusted costs it its class alone
            if key.plain is not None:
                return key.plain
            raise self._failures.explain(error) from error
        except Exception as error:  # whatever a key of the user's own raises when it is hashed
            damaged = DamagedError(f"a mapping's key can't be one: {error}", [])
            raise self._failures.explain(damaged) from error
        return value
