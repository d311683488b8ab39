"""Faces whose names are imported when somebody asks for them, so that importing the face costs nothing.

Enters: which module of a face gives which names. Leaves: the face's ``__getattr__`` and ``__dir__``
(PEP 562). Invariant: a name is looked up once; from then on it is the face's own, as after an import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazily(face: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__, __dir__`` of the package ``face``: ``modules`` are its modules, each with the names that
    the face takes from it, blanks between them. The modules are attributes of it too, as after an import.

    Type checkers do not look in here: for them the same imports stand under ``TYPE_CHECKING``, and a test
    compares the two. A name that is a module's too has to be imported at once: the module would take its
    place.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f"{face}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {face!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{face}.{module_of[name]}"), name)
        setattr(sys.modules[face], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[face]), *module_of, *modules})

    return get, names
