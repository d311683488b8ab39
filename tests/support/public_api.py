"""Writes down the public API, for a test to compare: names, bases, signatures, attributes.

    python -m tests.support.public_api > tests/unit/public_api.txt

A line that changes or goes breaks somebody's program; one that comes is a promise.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Protocol

import dcp_async
import dcp_async.formats
import dcp_async.interop
import dcp_async.storage
import dcp_async.sync
import dcp_async.testing

STORAGE = (
    "Finding",
    "LocalStorage",
    "MemoryStorage",
    "ObjectStorage",
    "Reader",
    "Retries",
    "Storage",
    "StoredCheckpoint",
    "Transaction",
)
"""What of the storage is for third parties; the rest of its face is the package's own."""
FORMATS = ("DistcpFormat", "SafetensorsFormat")
"""Which may be chosen; what a format is made of may change."""
FACES: dict[ModuleType, Iterable[str]] = {
    dcp_async: dcp_async.__all__,
    dcp_async.sync: dcp_async.sync.__all__,
    dcp_async.storage: STORAGE,
    dcp_async.formats: FORMATS,
    dcp_async.testing: dcp_async.testing.__all__,
    dcp_async.interop: dcp_async.interop.__all__,
}
MADE_BY_THE_ENGINE = {"AsyncSaveResponse", "Checkpoint", "CheckpointHandle", "CheckpointInfo", "LoadReport"}
"""Their constructors are nobody else's."""
OF_A_STORAGE = {name for name in vars(dcp_async.storage.Storage) if not name.startswith("_")}
PUBLIC = {
    "AppState": {"load_state_dict", "state_dict"},
    "CheckpointHandle": {"add_done_callback", "done", "exception", "result", "wait"},
    "DistcpFormat": set(),
    "LocalStorage": OF_A_STORAGE,
    "MemoryStorage": {"clear", *OF_A_STORAGE},
    "ObjectStorage": {"check", *OF_A_STORAGE},
    "PerRank": {"key"},
    "SafetensorsFormat": set(),
    "Stager": {"close", "open", "options"},
    # its tests may grow in number: a storage that fails a new one has broken a promise before
    "StorageContract": {"keeps_opened_files", "leave_behind", "storage_at"},
    "StorageError": {"errno", "path", "verb"},
}
"""Members of classes whose other ones are between them and the package, as docs/reference/api.md has it."""
_LITERALS = (type(None), bool, int, float, str, tuple)


def api() -> str:
    """The public API as text, sorted."""
    return "".join(
        f"{line}\n"
        for face, names in FACES.items()
        for name in sorted(names)
        for line in _lines(f"{face.__name__}.{name}", getattr(face, name))
    )


def _lines(name: str, value: Any) -> Iterator[str]:
    if inspect.isfunction(value):
        yield f"{name}{_signature(value)}"
        return
    if not inspect.isclass(value):
        yield f"{name} = {value}"
        return
    short = value.__name__
    bases = [base.__name__ for base in value.__bases__ if base is not object and _is_public(base)]
    yield f"class {name}({', '.join(bases)})"
    if short not in MADE_BY_THE_ENGINE and Protocol not in value.__bases__ and _is_made_by_ours(value):
        yield f"{name}{_signature(value)}"
    for member, text in sorted(_members(value).items()):
        if member in PUBLIC.get(short, {member}):
            yield f"{name}.{member}{text}"


def _is_made_by_ours(cls: type) -> bool:
    maker = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return maker.__module__.startswith("dcp_async")


def _is_public(base: type) -> bool:
    return not base.__module__.startswith("dcp_async") or base.__name__ in dcp_async.__all__


def _members(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if base.__module__.startswith("dcp_async")]):
        for attribute, annotation in inspect.get_annotations(base).items():
            found[attribute] = f": {annotation}"
        for attribute in _assigned(base):
            found.setdefault(attribute, "")
        for attribute, value in vars(base).items():
            if isinstance(value, property):
                assert value.fget is not None
                found[attribute] = f" {_signature(value.fget).partition('-> ')[2]} (property)"
            elif isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(value):
                function = getattr(cls, attribute)
                kind = "async " if inspect.iscoroutinefunction(function) else ""
                found[attribute] = f" {kind}{_signature(function)}"
    return {attribute: text for attribute, text in found.items() if not attribute.startswith("_")}


def _assigned(cls: type) -> list[str]:
    """What ``__init__`` sets on the object."""
    if "__init__" not in vars(cls) or dataclasses.is_dataclass(cls):
        return []
    tree = ast.parse(textwrap.dedent(inspect.getsource(vars(cls)["__init__"])))
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]


class _Text(str):
    """Stands for a value whose repr is nobody's promise."""

    __repr__ = str.__str__


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_text(parameter.annotation), default=_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=parameters, return_annotation=_text(signature.return_annotation)))


def _default(value: Any) -> Any:
    if value is inspect.Parameter.empty or isinstance(value, _LITERALS):
        return value
    return _Text(getattr(value, "__qualname__", f"{type(value).__qualname__}()"))


def _text(annotation: Any) -> Any:
    return _Text(annotation) if isinstance(annotation, str) else annotation


if __name__ == "__main__":
    sys.stdout.write(api())
