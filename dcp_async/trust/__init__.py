"""Every unpickler of the package, and what it may call; imports nothing of ours."""

from __future__ import annotations

from .archived import Archived, Memory, load_archived
from .key_hashes import MAX_ALIKE, check_hashes
from .legacy_item import COUNT_BYTES, check_count, is_legacy, legacy_outline
from .pickle_grammar import run
from .pickle_walk import Made, Walk, get_operands
from .plain_data import dumps, loads
from .policy import Trust
from .torch_rebuilders import UntrustedGlobal
from .unpickler import Inert, check_globals, is_zip, load_item, load_pickle, untrusted_names

__all__ = [
    "COUNT_BYTES",
    "MAX_ALIKE",
    "Archived",
    "Inert",
    "Made",
    "Memory",
    "Trust",
    "UntrustedGlobal",
    "Walk",
    "check_count",
    "check_globals",
    "check_hashes",
    "dumps",
    "get_operands",
    "is_legacy",
    "is_zip",
    "legacy_outline",
    "load_archived",
    "load_item",
    "load_pickle",
    "loads",
    "run",
    "untrusted_names",
]
