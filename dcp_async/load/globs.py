"""Patterns of names: which they match, and what they are replaced by.

Enters: what callers pass as ``keys`` and ``rename``. Leaves: answers about names, or ValueError and TypeError
for what can't be a pattern. Pure. A dot is a character like any other: ``*`` reaches over levels.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from ..formats import heads_of

_WILDCARDS = re.compile(r"\*|\?|\[!?[^\]]+\]")
"""What fnmatch knows: anything, one character, one character out of a set."""


class Glob:
    """A name, or a pattern of names; means everything at and below what it matches."""

    def __init__(self, text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"keys are names or patterns of names, not {text!r}")
        self.text = str.__str__(text)
        self.is_pattern = _WILDCARDS.search(self.text) is not None
        self._match = re.compile(fnmatch.translate(self.text)).match
        self._inside = f"{self.text}."

    def matches(self, name: str) -> bool:
        """Whether ``name``, or what it lies below, is meant."""
        # by itself first: a name may have such characters of its own
        if name == self.text or name.startswith(self._inside):
            return True
        return self.is_pattern and any(self._match(head) for head in heads_of(name))


class Substitution:
    """New names by a mapping of patterns; the first that matches a name renames it, all others stay."""

    def __init__(self, patterns: Mapping[str, str]) -> None:
        """``patterns``: each ``*`` in a new name stands for what the wildcard of the same number matched.
        Raises TypeError, ValueError."""
        self._rules: list[tuple[str, re.Pattern[str], list[str]]] = []
        for old, new in patterns.items():
            if not (isinstance(old, str) and isinstance(new, str)):
                raise TypeError(f"rename={{{old!r}: {new!r}}}: both are names or patterns of names")
            wildcards, texts = _WILDCARDS.findall(old), new.split("*")
            if len(wildcards) != len(texts) - 1:
                raise ValueError(
                    f"rename={{{old!r}: {new!r}}}: each wildcard on the left is a * on the right, and "
                    f"there are {len(wildcards)} and {len(texts) - 1}"
                )
            self._rules.append((old, _grouped(old), texts))

    def __call__(self, name: str) -> str:
        for _, pattern, texts in self._rules:
            if (match := pattern.fullmatch(name)) is not None:
                *matched, below = match.groups(default="")
                return "".join(part for pair in zip(texts, [*matched, below], strict=True) for part in pair)
        return name

    def check_used(self, names: Iterable[str]) -> None:
        """Raises ValueError if a pattern matches none of ``names``."""
        known = list(names)
        for old, pattern, _ in self._rules:
            if not any(map(pattern.fullmatch, known)):
                raise ValueError(f"it holds nothing that {old!r} of rename would rename")


def _grouped(text: str) -> re.Pattern[str]:
    """A pattern of names with a group for each wildcard, and one for what lies below."""
    made, end = "", 0
    for wildcard in _WILDCARDS.finditer(text):
        made += re.escape(text[end : wildcard.start()])
        end = wildcard.end()
        if wildcard[0] == "*":
            # the last one takes all that is left
            made += "(.*)" if end == len(text) else "(.*?)"
        elif wildcard[0] == "?":
            made += "(.)"
        else:
            # a set of re's knows escapes and operations that one of fnmatch's does not
            chars = re.sub(r"([\\\[^&~|])", r"\\\1", wildcard[0][1:-1])
            made += f"([{'^' + chars[1:] if chars.startswith('!') else chars}])"
    try:
        return re.compile(f"{made}{re.escape(text[end:])}(\\..*)?", re.DOTALL)
    except re.error as error:
        raise ValueError(f"{text!r} is no pattern of names: {error}") from error
