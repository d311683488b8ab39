"""An abstract unpickler's stack and memory: of every object how large it would be, and nothing else of it.

Enters: what the opcodes of a pickle do, one by one (pickle_grammar.py). Leaves: ValueError as soon as an
object would be out of proportion to the pickle's bytes. Pure. Invariants of what passes: no object is nested
deeper than MAX_DEPTH; what is hashed, copied by a call, or met in a walk over everything (``repr``, ``==``)
is bounded by a multiple of the pickle's length, however often the pickle refers to the same object; and
nothing is changed after it was put into something else, so that what was checked once stays so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

MAX_DEPTH = 1000
"""CPython's own pickler stops near this by its recursion limit, so no honest pickle is deeper."""
_MAX_EARLY = 100
"""References to an unfinished deque or its like: those are freed recursively, and a reference hides depth."""
_RISKY_KEYS = 1000
"""So many keys whose hash an attacker can choose take no time that matters, if all of them collide."""
_SHORT = 256


class Made:
    """What stands for an object: how large everything is that can be reached from it."""

    __slots__ = ("depth", "hashed", "kind", "name", "own", "weight")

    def __init__(
        self,
        kind: str,
        *,
        weight: int = 1,
        hashed: int = 1,
        depth: int = 0,
        name: tuple[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.weight = weight
        """Objects that a walk over it meets, each as often as it is referred to."""
        self.hashed = hashed
        """Steps of hashing it."""
        self.depth = depth
        self.name = name
        """A global's own; an object has that of what was called to make it."""
        self.own = False
        """Still where it was made, so that it may be changed."""


ATOM: Final = Made("atom")
_UNKNOWN: Final = Made("object", weight=8, hashed=64, depth=8)
"""Something that an entry of a recognised form has stored; see metadata_grammar.py."""


@dataclass(slots=True)
class Outline:
    """What was found out about a pickle."""

    end: int = 0
    names: list[tuple[str, str]] = field(default_factory=list)
    """The globals that it names, in order."""


class Walk:
    """The abstract unpickler: its stack, its memory, and where it is."""

    def __init__(self, raw: bytes | bytearray, start: int, *, seeded_keys: bool) -> None:
        """
        Args:
            seeded_keys: whether whoever unpickles looks after colliding keys itself.
        """
        self.raw = bytes(raw) if isinstance(raw, bytearray) else raw
        self.at = start
        self.limit = len(raw)
        """Where the frame ends in which the walk is: C's unpickler goes astray where an opcode reaches past
        it."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}
        self.num_stored = 0
        """What MEMOIZE numbers by."""
        self.is_dense = True
        """Memory is numbered as MEMOIZE does, so that the next number is known."""
        self.has_passed = False
        """Whether entries were passed over as a whole, whose memory is not kept here but for ``texts``."""
        self.texts: set[bytes] = set()
        """The opcodes that fetch text which such entries stored."""
        self.outline = Outline()
        nbytes = len(raw) - start
        self._most_stored = nbytes // 2 + 1
        self._max_weight = 1000 * nbytes + (1 << 20)
        self._hash_left = 256 * nbytes + (1 << 20)
        self._copy_left = 8 * nbytes + (1 << 20)
        self._early_left = _MAX_EARLY
        self._risky_left = None if seeded_keys else _RISKY_KEYS

    # --- reading

    def take(self, nbytes: int) -> bytes:
        start = self.at
        self.at += nbytes
        if self.at > len(self.raw):
            raise ValueError("the pickle was cut off")
        return bytes(self.raw[start : self.at])

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def skip(self, nbytes: int) -> int:
        """Returns ``nbytes``, which lie behind the walk then."""
        self.at += nbytes
        if self.at > len(self.raw):
            raise ValueError("the pickle was cut off")
        return nbytes

    def line(self) -> bytes:
        start = self.at
        self.at = self.raw.find(b"\n", start) + 1
        if self.at == 0:
            raise ValueError("the pickle was cut off")
        return self.raw[start : self.at - 1]

    def decimal(self) -> int:
        text = self.line()
        # int() takes signs, blanks and underscores as well, and no pickler writes these
        if len(text) > 20 or not text.isdigit():
            raise ValueError("the pickle numbers what it remembers in an unusual way")
        return int(text)

    # --- the stack and the memory

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the pickle takes what it never put there")
        return self.stack.pop()

    def top(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError("the pickle takes what it never put there")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("the pickle ends a list that never began")
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def push_new(self, made: Made) -> None:
        made.own = True
        self.stack.append(made)

    def store(self, number: int) -> None:
        # C's memory is an array: one number of four bytes would make it gigabytes long
        if number > self._most_stored:
            raise ValueError("the pickle remembers more objects than it has")
        self.is_dense = self.is_dense and number == self.num_stored
        # no pickler does, and what was found out about the first would be believed of the second
        if number in self.memory:
            raise ValueError("the pickle remembers two objects under one number")
        self.num_stored += 1
        self.memory[number] = self.top()

    def fetch(self, number: int) -> None:
        made = self.memory.get(number)
        if made is None:
            made = self.passed(number)
        # what refers to it before it is finished does not count what it gets later
        if type(made) is Made and made.own:
            if made.kind == "object" and made.name is not None and made.name[0] in _FREED_DEEPLY:
                self._early_left -= 1
                if self._early_left < 0:
                    raise ValueError("the pickle refers too often to what is not finished yet")
            made = Made("early", weight=made.weight, hashed=made.hashed, depth=made.depth)
        self.stack.append(made)

    def passed(self, number: int) -> Any:
        """What was stored by entries that were passed over as a whole."""
        if self.texts.isdisjoint(get_operands(number)):
            if not self.has_passed:
                raise ValueError(f"the pickle refers to memory {number}, which holds nothing")
            return _UNKNOWN
        return b""

    # --- what happens to objects

    def put_into(self, items: list[Any]) -> tuple[int, int]:
        """(weight, depth) of ``items``, which belong to another object from now on."""
        weight, depth = len(items), 0
        # in C: most containers hold nothing but numbers
        if items.count(ATOM) != weight:
            for item in items:
                if item is ATOM:
                    continue
                if type(item) is bytes:
                    weight += len(item) >> 3
                    continue
                # it can be met by two ways from here on, so what is known of it must stay true
                item.own = False
                weight += item.weight
                if item.depth > depth:
                    depth = item.depth
        if weight > self._max_weight:
            raise ValueError("the pickle holds the same objects within each other too many times")
        if depth >= MAX_DEPTH:
            raise ValueError(f"the pickle nests objects more than {MAX_DEPTH} deep")
        return weight, depth + 1

    def hash_all(self, keys: list[Any]) -> None:
        """Account for keys that will be hashed."""
        if keys.count(ATOM) == len(keys):
            return
        steps = 0
        for key in keys:
            if type(key) is bytes or key is ATOM or key.kind == "text":
                continue
            steps += key.hashed
            if self._risky_left is not None and not (key.kind == "object" and key.name in _BY_IDENTITY):
                # hashes of text are seeded per process; those of long numbers and tuples can be chosen
                self._risky_left -= 1
                if self._risky_left < 0:
                    raise ValueError("the pickle has too many keys that are no names or numbers")
        self._hash_left -= steps
        if self._hash_left < 0:
            raise ValueError("the pickle has keys that would take too long to hash")

    def fill(self, target: Any, weight: int, depth: int) -> None:
        """``target``, which is where it was made, holds more."""
        if type(target) is not Made or not target.own or target.kind in ("early", "tuple", "frozenset"):
            raise ValueError("the pickle changes an object that is in use already")
        target.weight += weight
        target.depth = max(target.depth, depth)
        if target.weight > self._max_weight:
            raise ValueError("the pickle holds the same objects within each other too many times")

    def push_tuple(self, items: list[Any]) -> None:
        weight, depth = self.put_into(items)
        hashed = weight
        if weight != len(items):
            # a tuple hashes its parts each time: one of itself twice, sixty times, is hashed for ever
            hashed = 1 + sum(1 if type(item) is bytes else item.hashed for item in items)
        self.stack.append(Made("tuple", weight=weight + 1, hashed=hashed + 1, depth=depth))

    def push_call(self, function: Any, *arguments: Any) -> None:
        """What a call gives: no larger than what it was given, which it may copy, and hash."""
        given: list[Any] = list(arguments)
        # the function too: what was called is in use, and can't be changed any more
        weight, depth = self.put_into([function, *given])
        copied = weight + sum(len(part) if type(part) is bytes else part.weight for part in given)
        self._copy_left -= copied
        # a call may hash all that it is given, as set() does
        self._hash_left -= copied
        if self._copy_left < 0 or self._hash_left < 0:
            raise ValueError("the pickle makes objects out of proportion to its length")
        name = function.name if type(function) is Made and function.kind == "global" else None
        made = Made("object", weight=1 + copied, hashed=1 + copied, depth=depth, name=name)
        self.push_new(made)

    def push_global(self, module: bytes, name: bytes) -> None:
        full_name = (module.decode("utf-8", "surrogatepass"), name.decode("utf-8", "surrogatepass"))
        self.outline.names.append(full_name)
        self.stack.append(Made("global", name=full_name))

    def push_text(self, nbytes: int) -> None:
        # kept, as STACK_GLOBAL may take its name from it
        if nbytes < _SHORT:
            self.stack.append(self.take(nbytes))
        else:
            self.skip(nbytes)
            self.stack.append(Made("text", weight=1 + nbytes // 8))


_FREED_DEEPLY = frozenset({"builtins", "__builtin__", "collections", "types"})
_BY_IDENTITY = frozenset(
    (f"torch.distributed.{package}.metadata", "MetadataIndex")
    for package in ("checkpoint", "_shard.checkpoint")
)
"""What stands for these is hashed by identity when `.metadata` is unpickled."""


def get_operands(number: int) -> tuple[bytes, ...]:
    """The opcodes that fetch memory ``number``, operands included."""
    long = b"j" + number.to_bytes(4, "little")
    return (long, b"h" + bytes([number])) if number < 256 else (long,)
