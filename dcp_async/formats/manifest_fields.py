"""The fields of a manifest, each of the type that it is asked for, whoever wrote them.

Enters: JSON. Leaves: plain values, or a ManifestError that says what stands there instead. Pure.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Set
from typing import Any

from ..info import JSON


class ManifestError(ValueError):
    """A manifest that is damaged or was written by a newer release."""


@contextlib.contextmanager
def manifest_errors() -> Iterator[None]:
    try:
        yield
    except ManifestError:  # a ValueError too, and it says already what is wrong
        raise
    except KeyError as error:
        raise ManifestError(f"it lacks {error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or JSON without end
        raise ManifestError(f"it is no JSON: {error}") from error


HEX = re.compile("[0-9a-f]{16}")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""What no file name and no text file may hold."""
_BLANKS = (" ", "\t", "\n", "\r")
MAX_INT = (1 << 63) - 1


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    fields = dict(pairs)
    # of two values json keeps the last, and another reader may keep the first
    if len(fields) != len(pairs):
        raise ManifestError("it says something twice")
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def leading_fields(text: str, wanted: Set[str]) -> dict[str, JSON]:
    """The fields of an object, up to the last of those that are wanted. Raises ValueError."""
    # one value at a time: json.loads() would decode the tree as well
    scan = DECODER.raw_decode
    fields: list[tuple[str, JSON]] = []
    position = _behind(("{",), text, 0)
    missing = set(wanted)
    while missing:
        name, position = scan(text, position)
        if type(name) is not str:
            raise ValueError("a field of it has no name")
        value, position = scan(text, _behind((":",), text, position))
        fields.append((name, value))
        missing.discard(name)
        # behind the object's end nothing is a field of it, whatever it looks like
        position = _behind((",",) if missing else (",", "}"), text, position)
    return _unique(fields)


def _behind(marks: tuple[str, ...], text: str, position: int) -> int:
    """Where the next token begins, after one of ``marks``; blanks around it are skipped."""
    while text[position : position + 1] in _BLANKS:
        position += 1
    if not text.startswith(marks, position):
        raise ValueError(f"it has no {' or '.join(marks)} at character {position}")
    position += 1
    while text[position : position + 1] in _BLANKS:
        position += 1
    return position


def parsed(raw: bytes) -> object:
    """The JSON in ``raw``. Infinity and NaN are no JSON, but earlier releases wrote them for keys of the
    tree: there they are read, elsewhere they raise ValueError."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    document = json.loads(raw, object_pairs_hook=_unique, parse_constant=constant)
    if constants and isinstance(document, dict):
        json.dumps({name: value for name, value in document.items() if name != "structure"}, allow_nan=False)
    return document


class Fields:
    """An object of JSON, whose fields have the types that they are asked for as. Raises ManifestError."""

    def __init__(self, value: object) -> None:
        if type(value) is not dict:
            raise ManifestError(f"a {type(value).__name__} stands for an object")
        self.found: dict[str, Any] = value

    def _wrong(self, name: str) -> ManifestError:
        return ManifestError(f"its {name} is {shown(self.found[name])}")

    def text(self, name: str, form: re.Pattern[str] | None = None) -> str:
        value = self.found[name]
        if type(value) is not str or _UNWRITABLE.search(value) or (form and not form.fullmatch(value)):
            raise self._wrong(name)
        return value

    def integer(self, name: str, least: int | None = None) -> int:
        """Any at all without a ``least``: earlier releases saved steps that this one refuses."""
        value = self.found[name]
        # by exact type: to Python true is a number
        if type(value) is not int or (least is not None and not least <= value <= MAX_INT):
            raise self._wrong(name)
        return value

    def step(self) -> int | None:
        return None if self.found["step"] is None else self.integer("step")

    def seconds(self, name: str) -> float:
        value = self.found[name]
        # no comparison with NaN holds, so it is refused as well
        if type(value) not in (int, float) or not -MAX_INT <= value <= MAX_INT:
            raise self._wrong(name)
        return float(value)


def shown(value: object) -> str:
    """What may stand in a message: of any length and depth, it is cut."""
    if isinstance(value, (bool, float)) or value is None:
        return repr(value)
    if isinstance(value, int):
        # CPython refuses to write a number of thousands of digits
        return repr(value) if value.bit_length() < 64 else "a number too large"
    return ascii(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"
