"""A saved tree under other names, or a part of it: what a load sees that renames what was saved.

Enters: a Tree, and a new name for each leaf. Leaves: a Tree in which the leaves have these. Invariant:
whatever the new name and the old one have in common, keys and kinds of containers included, stays as it was
saved; only what is new is cut at dots. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .keys import text_of
from .tree import Tree, child_name, children_of, kind_of, list_node, mapping_node

_Path = tuple[tuple[Any, str], ...]
"""From the root on: each key, and the kind of the container that has it."""


def moved(path: Sequence[tuple[Any, str]], name: str) -> _Path:
    """Where a leaf lies that was at ``path`` and is called ``name`` now."""
    texts = [text_of(key) for key, _ in path]
    first, rest = 0, name
    while first < len(texts) and rest.startswith(f"{texts[first]}."):
        rest = rest[len(texts[first]) + 1 :]
        first += 1
    last, is_left = len(texts), True
    while is_left and last > first and (rest == texts[last - 1] or rest.endswith(f".{texts[last - 1]}")):
        last -= 1
        is_left = rest != texts[last]
        rest = rest[: -len(texts[last]) - 1]
    # a key with dots, as modules have them, is one key under its new name as well
    is_one_key = last - first == 1 and "." in texts[first]
    middle = () if not is_left else (rest,) if is_one_key else tuple(rest.split("."))
    # what has the first new key is what had the old one in its place
    above = path[first][1] if first < len(path) else "dict"
    kinds = (above, *("dict" for _ in middle[1:]))
    return (*path[:first], *zip(middle, kinds, strict=False), *path[last:])


class _Node:
    """A container that is being filled."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.children: dict[str, tuple[Any, _Node | None]] = {}
        """Text of a key -> (key, node); None is a leaf."""

    def put(self, path: _Path, end: _Node | None, name: str) -> None:
        """Put ``end`` at ``path``. Raises ValueError if something lies there, or on the way."""
        node = self
        for (key, _), (_, kind) in itertools.pairwise(path):
            _, below = node.children.setdefault(text_of(key), (key, _Node(kind)))
            if below is None:
                raise ValueError(f"{name} would lie inside of another name")
            node = below
        key, _ = path[-1]
        if text_of(key) in node.children:
            raise ValueError(f"{name} would lie where other names do")
        node.children[text_of(key)] = (key, end)

    def encoded(self) -> Tree:
        """The tree."""
        entries = [(key, None if node is None else node.encoded()) for key, node in self.children.values()]
        if self.kind == "list" and all(type(key) is int for key, _ in entries):
            # what is left out leaves a hole: an index is part of a name
            by_index = dict(entries)
            hole = mapping_node("dict", ())
            return list_node([by_index.get(index, hole) for index in range(max(by_index, default=-1) + 1)])
        return mapping_node("dict" if self.kind == "list" else self.kind, entries)


def renamed_tree(tree: Tree, rename: Callable[[str], str | None]) -> Tree:
    """``tree`` with the leaves, and the containers that are empty, under the names that ``rename`` gives;
    None leaves one out. Raises ValueError if two can't be in one tree."""
    root = _Node(kind_of(tree) or "dict")
    for path, name, kind in _ends(tree, (), None):
        new = rename(name)
        if new is not None:
            root.put(path if new == name else moved(path, new), kind and _Node(kind), new)
    return root.encoded()


def renamed_paths(
    paths: Mapping[str, tuple[str | int, ...]], names: Mapping[str, str]
) -> dict[str, tuple[str | int, ...]]:
    """Paths as ``planner_data`` has them, by name, under new ``names`` (old -> new)."""
    made = {}
    for name, new in names.items():
        path = paths.get(name, (name,))
        made[new] = path if new == name else tuple(key for key, _ in moved([(key, "") for key in path], new))
    return made


def _ends(tree: Tree, path: _Path, name: str | None) -> Iterator[tuple[_Path, str, Any]]:
    """(path, name, kind) of each leaf, whose kind is None, and of each container that is empty."""
    kind = kind_of(tree)
    children = children_of(tree)
    if not children and name is not None:
        yield path, name, kind
    for key, child in children:
        yield from _ends(child, (*path, (key, kind or "dict")), child_name(name, key))
