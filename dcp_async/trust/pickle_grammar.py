"""What a pickle would build, found out before anything is built: one pass over its opcodes.

Enters: pickled bytes of unknown origin. Leaves: where the pickle ends and which globals it names, or
ValueError for one whose objects would be out of proportion to its bytes, see pickle_walk.py. Pure: nothing is
imported, called, hashed or compared. An opcode that is not here has no place in a pickle: those of extension
codes and of buffers out of band. docs/adr/0015 says why this is a grammar and no list of attacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .pickle_walk import ATOM, Made, Outline, Walk

_MAX_DIGITS = 4300
"""How long an integer in text may be, as CPython has it: reading more of them takes quadratic time."""
_RUN = re.compile(rb"(?s:K.|M..|J....|G.{8}|[N\x88\x89])++")
# The empty group at its end: findall() then makes no bytes of what it counts.
_ONE = re.compile(rb"(?s:K.|M..|J....|G.{8}|[N\x88\x89])()")
Entries = Callable[["Walk"], None]
"""Passes over entries of a recognised form, if some begin where the walk is."""


_Action = Callable[[Walk], None]
_ACTIONS: dict[int, _Action] = {}
_BEFORE_ENTRIES = frozenset(b"(\x94qrbt\x85\x86\x87\x95")


def _on(opcodes: bytes) -> Callable[[_Action], _Action]:
    def register(action: _Action) -> _Action:
        _ACTIONS.update(dict.fromkeys(opcodes, action))
        return action

    return register


@_on(b"\x80")
def _proto(walk: Walk) -> None:
    walk.skip(1)


@_on(b"\x95")
def _frame(walk: Walk) -> None:
    nbytes = walk.number(8)
    if nbytes > len(walk.raw) - walk.at:
        raise ValueError("the pickle was cut off")
    # C's unpickler and Python's do not agree on it: what was walked must be what is read
    if walk.limit < len(walk.raw):
        raise ValueError("the pickle has a frame within a frame")
    if nbytes:
        walk.limit = walk.at + nbytes


@_on(b"KMJGN\x88\x89")
def _scalars(walk: Walk) -> None:
    start = walk.at - 1
    # in runs: lists of numbers are long, and a Python step for each would be felt
    run = _RUN.match(walk.raw, start, walk.limit)
    if run is None:
        raise ValueError("the pickle was cut off")
    walk.at = end = run.end()
    count = len(_ONE.findall(walk.raw, start, end)) if end - start > 1 else 1
    walk.stack.extend([ATOM] * count)


@_on(b"\x8a")
def _long1(walk: Walk) -> None:
    nbytes = walk.skip(walk.number(1))
    # as cheap to hash as any number
    walk.stack.append(ATOM if nbytes <= 8 else Made("long", hashed=1 + nbytes // 8, weight=1 + nbytes // 8))


@_on(b"\x8b")
def _long4(walk: Walk) -> None:
    nbytes = walk.skip(walk.number(4))
    walk.stack.append(Made("long", hashed=1 + nbytes // 8, weight=1 + nbytes // 8))


@_on(b"ILF")
def _decimal(walk: Walk) -> None:
    nbytes = len(walk.line())
    if nbytes > _MAX_DIGITS:
        raise ValueError("the pickle has a number of too many digits")
    # so few digits fit into 64 bits
    walk.stack.append(ATOM if nbytes < 18 else Made("long", hashed=1 + nbytes // 16))


@_on(b"X")
def _unicode4(walk: Walk) -> None:
    walk.push_text(walk.number(4))


@_on(b"\x8c")
def _unicode1(walk: Walk) -> None:
    walk.push_text(walk.number(1))


@_on(b"\x8d")
def _unicode8(walk: Walk) -> None:
    walk.push_text(walk.number(8))


@_on(b"VS")
def _text_line(walk: Walk) -> None:
    text = walk.line()
    # such text may have escapes, so that it names no global, which protocols with STACK_GLOBAL do not need
    walk.stack.append(Made("text", weight=1 + len(text) // 8))


@_on(b"UC")
def _bytes1(walk: Walk) -> None:
    walk.push_text(walk.number(1))


@_on(b"TB")
def _bytes4(walk: Walk) -> None:
    walk.push_text(walk.number(4))


@_on(b"\x8e")
def _bytes8(walk: Walk) -> None:
    walk.push_text(walk.number(8))


@_on(b"\x96")
def _bytearray8(walk: Walk) -> None:
    nbytes = walk.skip(walk.number(8))
    walk.push_new(Made("bytearray", weight=1 + nbytes // 8))


@_on(b"(")
def _mark(walk: Walk) -> None:
    walk.marks.append(len(walk.stack))


@_on(b"0")
def _pop(walk: Walk) -> None:
    # POP takes a mark as well: C's unpickler and Python's agree in that
    if walk.marks and walk.marks[-1] == len(walk.stack):
        walk.marks.pop()
    else:
        item = walk.pop()
        # dropped to be remembered, as our own `.metadata` begins: what is fetched later is finished
        if type(item) is Made:
            item.own = False


@_on(b"1")
def _pop_mark(walk: Walk) -> None:
    # dropped, but they may be remembered: from now on nothing may change them
    walk.put_into(walk.pop_to_mark())


@_on(b"2")
def _dup(walk: Walk) -> None:
    top = walk.top()
    # of what can still be changed two would have to be watched, and picklers never write it
    if type(top) is Made and top.own and top.kind not in ("tuple", "frozenset", "global"):
        raise ValueError("the pickle duplicates an unfinished object")
    walk.stack.append(top)


@_on(b")")
def _empty_tuple(walk: Walk) -> None:
    walk.stack.append(Made("tuple"))


@_on(b"\x85\x86\x87")
def _short_tuple(walk: Walk) -> None:
    count = walk.raw[walk.at - 1] - 0x84
    if walk.marks and len(walk.stack) - count < walk.marks[-1]:
        raise ValueError("the pickle takes what it never put there")
    items = walk.stack[-count:]
    if len(items) < count:
        raise ValueError("the pickle takes what it never put there")
    del walk.stack[-count:]
    walk.push_tuple(items)


@_on(b"t")
def _tuple(walk: Walk) -> None:
    walk.push_tuple(walk.pop_to_mark())


@_on(b"]")
def _empty_list(walk: Walk) -> None:
    walk.push_new(Made("list"))


@_on(b"}")
def _empty_dict(walk: Walk) -> None:
    walk.push_new(Made("dict"))


@_on(b"\x8f")
def _empty_set(walk: Walk) -> None:
    walk.push_new(Made("set"))


@_on(b"l")
def _list(walk: Walk) -> None:
    weight, depth = walk.put_into(walk.pop_to_mark())
    walk.push_new(Made("list", weight=1 + weight, depth=depth))


@_on(b"d")
def _dict(walk: Walk) -> None:
    items = walk.pop_to_mark()
    made = Made("dict")
    made.own = True
    _set_items(walk, made, items)
    walk.push_new(made)


@_on(b"\x91")
def _frozenset(walk: Walk) -> None:
    items = walk.pop_to_mark()
    walk.hash_all(items)
    weight, depth = walk.put_into(items)
    walk.stack.append(Made("frozenset", weight=1 + weight, hashed=1 + weight, depth=depth))


@_on(b"a")
def _append(walk: Walk) -> None:
    item = walk.pop()
    walk.fill(walk.top(), *walk.put_into([item]))


@_on(b"e")
def _appends(walk: Walk) -> None:
    items = walk.pop_to_mark()
    walk.fill(walk.top(), *walk.put_into(items))


def _set_items(walk: Walk, target: Any, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("the pickle has a key without a value")
    walk.hash_all(items[::2])
    walk.fill(target, *walk.put_into(items))


@_on(b"s")
def _set_item(walk: Walk) -> None:
    value, key = walk.pop(), walk.pop()
    _set_items(walk, walk.top(), [key, value])


@_on(b"u")
def _set_items_op(walk: Walk) -> None:
    items = walk.pop_to_mark()
    _set_items(walk, walk.top(), items)


@_on(b"\x90")
def _add_items(walk: Walk) -> None:
    items = walk.pop_to_mark()
    walk.hash_all(items)
    walk.fill(walk.top(), *walk.put_into(items))


@_on(b"b")
def _build(walk: Walk) -> None:
    state = walk.pop()
    target = walk.top()
    if type(target) is Made and target.kind == "global":
        walk.put_into([state])
        return  # for whoever unpickles to refuse, by name
    walk.fill(target, *walk.put_into([state]))
    if type(state) is Made:
        # a __hash__ may go over all that the object was given
        target.hashed += state.weight


@_on(b"c")
def _global(walk: Walk) -> None:
    module, name = walk.line(), walk.line()
    # noted here, refused by whoever has a policy: this is arithmetic alone
    walk.push_global(module, name)


@_on(b"\x93")
def _stack_global(walk: Walk) -> None:
    name, module = walk.pop(), walk.pop()
    if type(name) is not bytes or type(module) is not bytes:
        raise ValueError("the pickle names a global by what is no short text")
    walk.push_global(module, name)


@_on(b"R\x81")
def _call(walk: Walk) -> None:
    arguments, function = walk.pop(), walk.pop()
    walk.push_call(function, arguments)


@_on(b"\x92")
def _call_with_names(walk: Walk) -> None:
    names, arguments, function = walk.pop(), walk.pop(), walk.pop()
    walk.push_call(function, arguments, names)


@_on(b"i")
def _instance(walk: Walk) -> None:
    module, name = walk.line(), walk.line()
    items = walk.pop_to_mark()
    walk.push_global(module, name)
    walk.push_call(walk.stack.pop(), *items)


@_on(b"o")
def _object(walk: Walk) -> None:
    function, *items = walk.pop_to_mark() or [None]
    if function is None:
        raise ValueError("the pickle makes an object of nothing")
    walk.push_call(function, *items)


@_on(b"P")
def _persistent_line(walk: Walk) -> None:
    walk.line()
    walk.push_new(Made("object"))


@_on(b"Q")
def _persistent(walk: Walk) -> None:
    # what it stands for is given by whoever unpickles; counted is what the pickle asks with
    weight, depth = walk.put_into([walk.pop()])
    walk.push_new(Made("object", weight=weight, depth=depth))


@_on(b"\x94")
def _memoize(walk: Walk) -> None:
    walk.store(walk.num_stored)


@_on(b"q")
def _put1(walk: Walk) -> None:
    walk.store(walk.number(1))


@_on(b"r")
def _put4(walk: Walk) -> None:
    walk.store(walk.number(4))


@_on(b"p")
def _put_line(walk: Walk) -> None:
    walk.store(walk.decimal())


@_on(b"h")
def _get1(walk: Walk) -> None:
    walk.fetch(walk.number(1))


@_on(b"j")
def _get4(walk: Walk) -> None:
    walk.fetch(walk.number(4))


@_on(b"g")
def _get_line(walk: Walk) -> None:
    walk.fetch(walk.decimal())


_STOP = ord(".")


def _leave_frame(walk: Walk) -> None:
    if walk.at > walk.limit:
        raise ValueError("the pickle was cut off, or has an opcode across the end of a frame")
    walk.limit = len(walk.raw)


def run(walk: Walk, entries: Entries | None = None) -> Outline:
    """Walk to STOP. Raises ValueError."""
    try:
        while (opcode := walk.raw[walk.at]) != _STOP:
            walk.at += 1
            action = _ACTIONS.get(opcode)
            if action is None:
                raise ValueError(f"the pickle has an opcode {opcode:#04x} that makes no sense there")
            action(walk)
            if walk.at >= walk.limit:
                _leave_frame(walk)
            if entries is not None and opcode in _BEFORE_ENTRIES:
                entries(walk)
                # entries end with the frame at most: they are matched up to its limit
                if walk.at == walk.limit:
                    _leave_frame(walk)
    except IndexError:  # cheaper than asking before each opcode whether bytes and stack are enough
        raise ValueError("the pickle was cut off, or takes what it never put there") from None
    # no pickler leaves anything behind, and unpicklers would not say so (docs/adr/0015)
    if len(walk.stack) != 1 or walk.marks:
        raise ValueError("the pickle ends with things left over")
    walk.outline.end = walk.at + 1
    return walk.outline


def check_pickle(raw: bytes | bytearray, start: int = 0) -> Outline:
    """What the pickle that begins at ``start`` names, and where it ends.

    Whoever unpickles it must look after keys that hash alike, as ``unpickler.py`` does.

    Raises: ValueError if what it would build is out of proportion, or if it is damaged.
    """
    return run(Walk(raw, start, seeded_keys=True))


def check_plain_pickle(raw: bytes) -> None:
    """Check a pickle for whoever does not look after keys. Raises ValueError."""
    run(Walk(raw, 0, seeded_keys=False))
