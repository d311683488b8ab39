"""Which names of a checkpoint a load asks for, and what they are called in the state.

Enters: ``keys`` and ``rename`` as callers pass them, and an opened checkpoint. Leaves: that part of it under
the state's names, as Contents like any other, or IncompatibleStateError. Pure. Invariant: what is asked for
is there, and no two names of the checkpoint become one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .._foreign import ENDINGS, words
from ..catalog import Contents
from ..errors import IncompatibleStateError
from ..formats import plain_dtype
from ..state import Targets, narrow, part_of_state
from .globs import Glob, Substitution

Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str]"
"""Names as they were saved -> names of the state."""


class Selection:
    """What a load was asked for: all of a checkpoint, or a part of it, under its own names or new ones."""

    def __init__(
        self,
        keys: Sequence[str] | str | None = None,
        rename: Rename | None = None,
        dequantize: torch.dtype | None = None,
    ) -> None:
        """Raises TypeError or ValueError for what can't be keys, a rename, or a dtype to make values plain
        in."""
        self._dtype = plain_dtype(dequantize)
        # a text is a sequence of its characters, and none of them would be a key
        texts = [keys] if isinstance(keys, str) else keys
        if texts is not None and not texts:
            raise ValueError("keys=[] asks for nothing; leave keys out to load everything")
        self._keys = None if texts is None else tuple(Glob(text) for text in dict.fromkeys(texts))
        self._rename: Callable[[str], str] | None
        if rename is None or callable(rename):
            self._rename = rename
        elif isinstance(rename, Mapping):
            self._rename = Substitution(rename)
        else:
            raise TypeError(f"rename is a mapping of names or a function, not {type(rename).__name__}")

    def plain(self, contents: Contents) -> Contents:
        """All of ``contents``, made plain if that was asked for. Raises LoadError."""
        return contents.dequantized(self._dtype)

    def of(self, contents: Contents) -> Chosen:
        """What it means for ``contents``. Calls the function that the caller gave, once for each name.

        Raises: IncompatibleStateError; LoadError as ``plain``.
        """
        contents = self.plain(contents)
        if self._keys is None and self._rename is None:
            return Chosen(contents)
        checkpoint_id = contents.info.checkpoint_id
        renamed = {name: self._new_name(name, checkpoint_id) for name in contents.names}
        # all were renamed first, for keys are names of the state
        names = {name: new for name, new in renamed.items() if self._asks(new)}
        try:
            _check_collisions(names)
            if isinstance(self._rename, Substitution):
                self._rename.check_used(contents.names)
            for key in self._keys or ():
                if not any(map(key.matches, names.values())):
                    raise ValueError(_unmatched(key, list(renamed.values())))
            part = contents.renamed(names, lambda name: self._for_empty(name, checkpoint_id))
        except ValueError as error:
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r}: {error}; nothing was loaded", checkpoint_id=checkpoint_id
            ) from error
        return Chosen(part, self._keys, renamed.values())

    def _asks(self, name: str) -> bool:
        return self._keys is None or any(key.matches(name) for key in self._keys)

    def _for_empty(self, name: str, checkpoint_id: str) -> str | None:
        """The new name of a container that is empty, so that it is none of the checkpoint's names."""
        new = self._new_name(name, checkpoint_id)
        return new if self._asks(new) else None

    def _new_name(self, name: str, checkpoint_id: str) -> str:
        if self._rename is None:
            return name
        try:
            new = self._rename(name)
        except ENDINGS:
            raise
        except BaseException as error:  # the caller's own code, which may raise anything
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r}: rename failed on {name!r} ({words(error)}); nothing was "
                "loaded",
                checkpoint_id=checkpoint_id,
            ) from error
        if not isinstance(new, str) or not new:
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r}: rename made {new!r} of {name!r}, which is no name; return it "
                "unchanged to keep it, and leave names out with keys=; nothing was loaded",
                checkpoint_id=checkpoint_id,
            )
        # plain text: a subclass may compare and hash in its own way
        return str.__str__(new)


class Chosen:
    """A part of one checkpoint, under the state's names."""

    def __init__(
        self, contents: Contents, keys: Sequence[Glob] | None = None, names: Iterable[str] = ()
    ) -> None:
        """``keys``: what was asked for, None for everything; ``names``: all of the checkpoint's, as the state
        calls them."""
        self.contents = contents
        self._keys = keys
        if keys is not None:
            self._all = sorted(names)
            self._selected = sorted(contents.names)

    def of_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of ``state`` is to be looked at; the same objects."""
        return state if self._keys is None else part_of_state(state, self)

    def narrow(self, targets: Targets) -> None:
        """Take out of ``targets`` what was not asked for."""
        if self._keys is not None:
            narrow(targets, self)
            # whatever was asked for is expected, wherever in the state it would lie
            targets.prefixes |= {name.partition(".")[0] for name in self._selected}

    def selects(self, name: str) -> bool:
        """Whether ``name`` of the state was asked for."""
        return any(key.matches(name) for key in self._keys or ())

    def touches(self, name: str) -> bool:
        """Whether something at or below ``name`` is loaded."""
        return self.selects(name) or _count(self._selected, name) > 0

    def takes(self, name: str) -> bool:
        """Whether what lies at ``name``, and takes its state whole, is loaded. Raises IncompatibleStateError
        if a part of it was asked for."""
        if self.selects(name):
            return True
        selected = _count(self._selected, name)
        if 0 < selected < _count(self._all, name):
            checkpoint_id = self.contents.info.checkpoint_id
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r}: keys ask for a part of {name!r}, which takes its state "
                f"whole; ask for {name!r}, or read the part with read(); nothing was loaded",
                checkpoint_id=checkpoint_id,
            )
        return selected > 0


def _check_collisions(names: Mapping[str, str]) -> None:
    """Raises ValueError if two names have one new name."""
    first: dict[str, str] = {}
    for name, new in names.items():
        if (other := first.setdefault(new, name)) != name:
            raise ValueError(f"rename makes {new!r} of both {other!r} and {name!r}")


def _unmatched(key: Glob, names: Sequence[str]) -> str:
    heads = list(dict.fromkeys(name.partition(".")[0] for name in names))
    shown = ", ".join(heads[:10])
    return f"it holds nothing that {key.text!r} of keys asks for; its names begin with {shown}"


def _count(names: Sequence[str], head: str) -> int:
    """How many of ``names``, which are sorted, are ``head`` or lie below it."""
    first = bisect_left(names, head)
    is_name = int(first < len(names) and names[first] == head)
    # "/" is the character behind ".": together they enclose all that begins with the head and a dot
    return is_name + bisect_left(names, f"{head}/") - bisect_left(names, f"{head}.")
