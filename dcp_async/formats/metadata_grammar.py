"""Whether `.metadata` may be given to an unpickler: the pass of pickle_grammar.py, at the speed of C for what
stock and this package write.

Enters: bytes of unknown origin. Leaves: nothing, or ValueError. An entry of one of three dicts (what a name
is, the path of a name, where an item lies) and a chunk are recognised by a regular expression as a whole.
Invariant: what an expression matches is a subset of what the opcodes that it passes over may do: it pushes
objects that are hashed by identity or are text, calls only what is stored as a global with a flat tuple of
numbers, hashes only what is stored as text, and stores nothing but those, their flat parts, and tuples of
text. So its effect does not depend on anything but what is read here, and no number of such entries makes
anything deep or shared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch

from ..trust import Made, Walk, get_operands, run

_STARTS = frozenset(b"X\x8chj")
_MAX_OF_ONE_NAME = 1000
_MAX_CONSTANTS = 100
_MAX_HASHED = 16
_MAX_FAMILIES = 32
"""How often the expressions are made anew at most, since more constants are known by then."""
_PATIENCE = 16
"""Misses since the last time after which they are made anew, if there were new globals."""
_RENEWALS = frozenset(4**power for power in range(1, 12))
"""Numbers of misses at which they are made anew in any case."""


def check_metadata_pickle(raw: bytes) -> None:
    """Raises ValueError if an unpickler must not have it."""
    run(Walk(raw, 0, seeded_keys=False), _Entries())


def check_places(places: object) -> None:
    """Raises ValueError if so many places of one name hash alike that a dict of them takes quadratic time.

    Hashes of texts are seeded, so those of two names can't be made to meet.
    """
    names = [
        name
        for index in (places if isinstance(places, dict) else ())
        if type(name := getattr(index, "fqn", None)) is str
    ]
    # a cheap pass first: hardly any tensor has a thousand chunks
    crowded = {name for name, count in Counter(names).most_common(1) if count > _MAX_OF_ONE_NAME}
    if not crowded:
        return
    crowds: Counter[tuple[str, int]] = Counter()
    for index in cast("dict[Any, Any]", places):
        if type(offset := getattr(index, "offset", None)) is torch.Size and type(index.fqn) is str:
            crowds[index.fqn, hash(offset)] += 1
    if max(crowds.values(), default=0) > _MAX_OF_ONE_NAME:
        raise ValueError("it has too many places that only a comparison could tell apart")


def _text(memoizes: bool, below: int) -> bytes:
    """A text of less than ``below`` bytes, as a pickle of that kind writes it."""
    zeros = b"" if memoizes else b"\0\0\0"
    # a branch per length: no expression counts by a number that it has read
    lengths = b"|".join(re.escape(bytes([n])) + zeros + b".{%d}" % n for n in range(below))
    return (b"\x8c(?:" if memoizes else b"X(?:") + lengths + b")"


_INT = b"(?:K.|M..|J....|\\x8a(?:" + b"|".join(re.escape(bytes([n])) + b".{%d}" % n for n in range(9)) + b"))"
_GET = b"(?:h.|j....)"
_FETCH = {ord("r"): b"j", ord("q"): b"h"}
"""What fetches what an opcode stores."""


def _tuple_of(part: bytes) -> bytes:
    """With as many parts as its opcode takes."""
    few = part + b"(?:\\x85|" + part + b"(?:\\x86|" + part + b"\\x87))"
    return b"(?:" + few + b"|\\(" + part + b"{0,64}t)"


_NUMBERS = _tuple_of(_INT)


def _any_of(numbers: Sequence[int]) -> bytes:
    """Opcodes that fetch one of ``numbers``."""
    low = b"".join(re.escape(bytes([number])) for number in numbers if number < 256)
    high = [get_operands(number)[0][1:] for number in numbers if number >= 256]
    fetches = [b"h[" + low + b"]"] if low else []
    fetches += [b"j" + re.escape(operand) for operand in high]
    return b"(?:" + b"|".join(fetches) + b")" if fetches else b"(?!)"


def _between(low: int, high: int) -> bytes:
    return b"[" + re.escape(bytes([low])) + b"-" + re.escape(bytes([high])) + b"]" if low <= high else b"(?!)"


def _put_from(least: int, bits: int) -> bytes:
    """Storing what is on top at ``least`` or above, at a number of so many ``bits``: memory is an array."""
    *low, top = least.to_bytes(4, "little")
    above = b"." * 3 + _between(top + 1, 255)
    fixed = re.escape(bytes([top]))
    for count, digit in zip((2, 1, 0), reversed(low), strict=True):
        above += b"|" + b"." * count + _between(digit + (count > 0), 255) + fixed
        fixed = re.escape(bytes([digit])) + fixed
    below = b"".join(_between(0, min(max((1 << bits) - 1 >> shift, 0), 255)) for shift in (0, 8, 16, 24))
    short = b"|q" + _between(least, 255) if least < 256 else b""
    return b"(?:r(?=" + below + b")(?:" + above + b")" + short + b")"


class _Vocabulary:
    """Opcodes as pickles write them that number their memory in one way, with these constants in it."""

    def __init__(
        self,
        memoizes: bool,
        least: int,
        bits: int,
        keys: tuple[int, ...],
        types: tuple[int, ...],
        consts: tuple[int, ...],
    ) -> None:
        """See _Family."""
        # what is stored under a number is not lost from sight: picklers store nothing twice
        self.put = b"\x94" if memoizes else _put_from(least, bits) + b"?+"
        self.stored = b"\x94()" if memoizes else b"(" + _put_from(least, bits) + b")?+"
        self.key, cls = _any_of(keys), _any_of(types)
        self.const = _any_of((*types, *consts))
        self.new = cls + b"\\)\x81" + self.put
        self.fields = b"\\}" + self.put + b"\\("
        numbers = b"(?:\\)\x85()|" + _NUMBERS + self.put + b"\x85())" + self.put + b"R" + self.put
        # a fetched one may be anything: it becomes an attribute, and attributes are not hashed
        self.size = b"(?:" + cls + numbers + b"|" + _GET + b")"

    def chunk(self) -> bytes:
        key, size = self.key, self.size
        return self.new + self.fields + key + size + key + size + b"ub()"

    def tensor(self) -> bytes:
        key, put, const = self.key, self.put, self.const
        flag = b"[\x88\x89]"
        more = b"(?:N|" + _NUMBERS + put + b"()|" + _GET + b")?"
        state = b"\\(" + const + const + flag + const + flag + more + b"t"
        properties = b"(?:" + self.new + state + put + b"b()|" + _GET + b")"
        chunks = b"\\]" + put + b"(?:" + self.chunk() + b"a|\\(" + _GET + b"*+e|" + _GET + b"a)"
        return self.new + self.fields + key + properties + key + self.size + key + chunks + b"ub()"

    def place(self) -> bytes:
        """An index and what it stands for."""
        key = self.key
        number = b"(?:N|" + _INT + b")"
        offset = b"(?:N|" + self.size + b")"
        index = self.new + self.fields + key + _GET + key
        index += b"(?:" + number + key + offset + b"|" + offset + key + number + b")ub"
        return index + self.new + self.fields + key + _GET + key + _INT + key + _INT + b"ub"


@lru_cache(maxsize=8)
class _Family:
    """The expressions for pickles that number their memory in one way, with these constants in it."""

    def __init__(
        self,
        memoizes: bool,
        least: int,
        bits: int,
        keys: tuple[int, ...],
        types: tuple[int, ...],
        consts: tuple[int, ...],
    ) -> None:
        """
        Args:
            memoizes: by MEMOIZE, so that one must count; else by PUT, at ``least`` and above, where nothing
                is yet, and with ``bits``.
            keys, types, consts: where texts lie, globals, and what is hashed as fast as a number.
        """
        words = _Vocabulary(memoizes, least, bits, keys, types, consts)
        put, stored = words.put, words.stored
        self.memoizes = memoizes
        part = b"(?:(" + _GET + b")|" + _text(memoizes, 64) + stored + b"|" + _INT + b")"
        parts = b"(?:" + part + b"(?:\x85|" + part + b"(?:\x86|" + part + b"\x87))|\\(" + part * 4 + b"t)"
        self.path = re.compile(b"(?s:(" + _GET + b")" + parts + put + b")")
        leaf = b"(?:" + words.new + b"()|" + words.const + b")(?=[Xu\\x8c])"
        described = b"(?:" + words.tensor() + b"|" + leaf + b")"
        self.names = re.compile(b"(?s:" + _text(memoizes, 256) + stored + described + b")")
        self.chunk = re.compile(b"(?s:" + words.chunk() + b")")
        self.place = re.compile(b"(?s:" + words.place() + b")")
        # the same where all is fetched, as in most: one part, or any number where the tuple is not stored
        flat = b"(?:" + _GET + b"|" + _INT + b")"
        tuples = _tuple_of(flat)
        self.loose_path = re.compile(b"(?s:(j....)" + tuples + b"(?=[^\x94qrp]))")
        # possessive, as all here: backtracking into what was passed would take time by its length
        self.loose_paths = re.compile(b"(?s:(?:j...." + tuples + b"(?=[^\x94qrp]))++)")
        self.short_path = re.compile(b"(?s:(j....)(j....)\x85" + put + b")")
        self.places = re.compile(b"(?s:(?:" + words.place() + b")++)")


# Groups that tell what was stored, for the three expressions of a family: how much each counts for.
_SIZE = (2, 3)
_OF_NAME = (1, 1, 2, *_SIZE, *_SIZE, *_SIZE, 2, 3, 1)
_OF_CHUNK = (*_SIZE, *_SIZE, 0)
_OF_PLACE = (*_SIZE, *_SIZE)


class _Entries:
    """Passes over entries that a family knows."""

    def __init__(self) -> None:
        self._family: _Family | None = None
        self._num_misses = 0
        """Places where no expression fitted."""
        self._made_at = 0
        """How many there had been when the family was made, which takes milliseconds."""
        self._num_names = 0
        """How many globals the walk had met by then; a new one may be a constant of all that follow."""
        self._left = _MAX_FAMILIES

    def __call__(self, walk: Walk) -> None:
        raw, marks, stack = walk.raw, walk.marks, walk.stack
        # asked after every opcode that an entry may follow: most calls end at this look
        if not marks or not marks[-1] or walk.at >= walk.limit or raw[walk.at] not in _STARTS:
            return
        filled = stack[marks[-1] - 1]
        # in use already: the walk refuses to fill it
        if type(filled) is not Made or not filled.own:
            return
        if filled.kind == "dict":
            # only where a key is due: what stands there for a value is no entry
            if not (len(stack) - marks[-1]) % 2 and not self._pass_entries(walk) and self._renew(walk):
                self._pass_entries(walk)
        elif filled.kind == "list" and self._family is not None and raw[walk.at] in b"hj":
            self._pass_chunks(walk, self._family)

    def _renew(self, walk: Walk) -> bool:
        """Whether there is another family, since more constants are known."""
        self._num_misses += 1
        num_names = len(walk.outline.names)
        fresh = num_names != self._num_names and self._num_misses - self._made_at >= _PATIENCE
        if not self._left or not (fresh or self._num_misses in _RENEWALS):
            return False
        self._left -= 1
        self._num_names, self._made_at = num_names, self._num_misses
        memoizes = walk.raw[:1] == b"\x80" and walk.raw[1:2] >= b"\x04"  # there is no other way from then on
        # MEMOIZE's numbers are known from counting only as long as nothing was stored by PUT
        if not walk.memory or (memoizes and not walk.is_dense):
            return False
        keys: list[int] = []
        types: list[int] = []
        consts: list[int] = []
        for number, made in walk.memory.items():
            if type(made) is bytes:
                keys.append(number)
            elif made.kind == "global":
                types.append(number)
            elif made.kind == "object" and not made.own and made.hashed <= _MAX_HASHED:
                consts.append(number)
        most = _MAX_CONSTANTS
        least = 0 if memoizes else max(walk.memory) + 1
        bits = 0 if memoizes else (len(walk.raw) // 2).bit_length()
        self._family = _Family(
            memoizes, least, bits, tuple(keys[:most]), tuple(types[:most]), tuple(consts[:most])
        )
        return True

    def _pass_entries(self, walk: Walk) -> bool:
        """Whether there were some, each a key and a value."""
        family, start = self._family, walk.at
        while family is not None:
            position = walk.at
            if family.path.match(walk.raw, position, walk.limit) is not None:
                self._pass_paths(walk, family)
            elif family.place.match(walk.raw, position, walk.limit) is not None:
                self._pass_places(walk, family)
            elif family.names.match(walk.raw, position, walk.limit) is not None:
                self._pass_names(walk, family)
            if walk.at == position:
                break
        return walk.at > start

    def _pass_names(self, walk: Walk, family: _Family) -> None:
        texts, position, number = walk.texts, walk.at, walk.num_stored
        if family.memoizes:
            position, number, _ = _count(family.names, walk, _OF_NAME, 0, texts)
        else:
            scanner = family.names.scanner(walk.raw, position, walk.limit)  # type: ignore[attr-defined]  # not in typeshed
            puts = [(match := entry)[1] for entry in iter(scanner.match, None)]
            position = match.end()
            texts.update(_FETCH[put[0]] + put[1:] for put in puts if put is not None)
        self._passed(walk, position, number, [b"", _VALUE])

    def _pass_paths(self, walk: Walk, family: _Family) -> None:
        texts, position, number = walk.texts, walk.at, walk.num_stored
        if (run := family.loose_paths.match(walk.raw, position, walk.limit)) is not None:
            if texts.issuperset(family.loose_path.findall(walk.raw, position, run.end())):
                self._passed(walk, run.end(), number, [b"", _VALUE])
            return
        scanner = family.short_path.scanner(walk.raw, position, walk.limit)  # type: ignore[attr-defined]  # not in typeshed
        for match in iter(scanner.match, None):
            key, part = match.groups()
            if key not in texts or part not in texts:
                break
            position = match.end()
            number += 1
        scanner = family.path.scanner(walk.raw, position, walk.limit)  # type: ignore[attr-defined]  # not in typeshed
        for match in iter(scanner.match, None):
            key, *parts = match.groups()
            if not all(self._is_text(walk, get) for get in (key, *parts[::2]) if get is not None):
                break
            for text in parts[1::2]:
                if text is not None:
                    texts.add(_FETCH[text[0]] + text[1:] if text else b"j" + number.to_bytes(4, "little"))
                    number += 1
            number += 1
            position = match.end()
        if position > walk.at:
            self._passed(walk, position, number if family.memoizes else walk.num_stored, [b"", _VALUE])

    @staticmethod
    def _is_text(walk: Walk, get: bytes) -> bool:
        return get in walk.texts or type(walk.memory.get(int.from_bytes(get[1:], "little"))) is bytes

    def _pass_places(self, walk: Walk, family: _Family) -> None:
        if family.memoizes:
            position, number, _ = _count(family.place, walk, _OF_PLACE, 4)
        else:
            match = family.places.match(walk.raw, walk.at, walk.limit)
            assert match is not None
            # PUT says its number itself, so nothing has to be counted
            position, number = match.end(), walk.num_stored
        self._passed(walk, position, number, [_PLACE, _VALUE])

    def _pass_chunks(self, walk: Walk, family: _Family) -> None:
        if family.chunk.match(walk.raw, walk.at, walk.limit) is not None:
            position, number, count = _count(family.chunk, walk, _OF_CHUNK, 2)
            self._passed(walk, position, number if family.memoizes else walk.num_stored, [_VALUE] * count)

    @staticmethod
    def _passed(walk: Walk, position: int, number: int, pushed: list[Any]) -> None:
        walk.at, walk.num_stored, walk.has_passed = position, number, True
        walk.stack.extend(pushed)


_VALUE = Made("object", weight=16, depth=8)
_PLACE = Made("object", name=("torch.distributed.checkpoint.metadata", "MetadataIndex"), weight=16, depth=8)


def _count(
    expression: re.Pattern[bytes],
    walk: Walk,
    costs: Sequence[int],
    fixed: int,
    texts: set[bytes] | None = None,
) -> tuple[int, int, int]:
    """Over entries from where ``walk`` is: (where they end, the number that MEMOIZE gives next, how many)."""
    position, number, count = walk.at, walk.num_stored, 0
    known: dict[tuple[Any, ...], int] = {}
    scanner = expression.scanner(walk.raw, position, walk.limit)  # type: ignore[attr-defined]  # not in typeshed
    for match in iter(scanner.match, None):
        if texts is not None:
            texts.add(b"j" + number.to_bytes(4, "little"))
        groups = match.groups()
        cost = known.get(groups)
        if cost is None:
            met = (weight for group, weight in zip(groups, costs, strict=True) if group is not None)
            cost = known[groups] = fixed + sum(met)
        number += cost
        position = match.end()
        count += 1
    return position, number, count
