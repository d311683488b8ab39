"""Trees in JSON, as the manifest holds them, also where ranks hold different parts of one.

A mapping whose keys are all str is [kind, {key: node}], any other [kind, [[key, node], ...]]; a key that JSON
has no word for is {"text": str(key), "pickle": base64}, and one of a class that extends str, int or float
also has "plain", its value without that class.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any, cast

from ..info import JSON
from ..trust import check_hashes
from .keys import PLAIN_KEYS, PickledKey, has_json, is_non_finite, pickled_key, plain_key, text_of
from .tree import Tree, list_node, mapping_node


def tree_to_json(node: Tree) -> JSON:
    """``node`` as the manifest holds it."""
    if node is None:
        return None
    kind, entries = node
    if kind == "list":
        return [kind, [tree_to_json(child) for child in entries]]
    if all(type(key) is str for key, _ in entries):
        # JSON's own objects where nothing is lost by it, since their keys are text
        return [kind, {key: tree_to_json(child) for key, child in entries}]
    return [kind, [[_key_to_json(key), tree_to_json(child)] for key, child in entries]]


def _key_to_json(key: Any) -> JSON:
    if has_json(key):
        return cast(JSON, key)
    if isinstance(key, PickledKey):
        raw, plain = key.raw, key.plain
    else:
        raw, plain = pickled_key(key), plain_key(key)
    encoded: dict[str, JSON] = {"text": text_of(key)}
    if raw is not None:
        encoded["pickle"] = base64.b64encode(raw).decode()
    if plain is not None and not is_non_finite(plain):
        encoded["plain"] = plain
    return encoded


MAX_TREE_DEPTH = 300
"""How deep containers may lie in each other: every recursion over a tree manages that within CPython's
limit."""


def tree_from_json(node: JSON) -> Tree:
    """The inverse of ``tree_to_json``, but for keys that were pickled.

    Raises: ValueError for what is no tree of containers within MAX_TREE_DEPTH.
    """
    if node is None:
        # the root is a mapping, never a leaf
        raise ValueError("there is nothing in it")
    return _tree_from_json(node, MAX_TREE_DEPTH)


def _tree_from_json(node: JSON, depth_left: int) -> Tree:
    if node is None:
        return None
    # by count, since Python's own limit depends on how deep the caller is
    if depth_left == 0:
        raise ValueError(f"it nests containers more than {MAX_TREE_DEPTH} deep")
    if not isinstance(node, list) or len(node) != 2:
        raise ValueError(f"a {type(node).__name__} is no node of a tree")
    kind, entries = node
    if kind == "list" and isinstance(entries, list):
        return list_node([_tree_from_json(child, depth_left - 1) for child in entries])
    if not isinstance(kind, str) or kind == "list":
        raise ValueError(f"a {type(kind).__name__} is no kind of container")
    if isinstance(entries, dict):
        children = [[key, _tree_from_json(child, depth_left - 1)] for key, child in entries.items()]
        return [kind, children]
    if not isinstance(entries, list):
        raise ValueError(f"a {type(entries).__name__} is no content of a mapping")
    pairs: list[tuple[JSON, JSON]] = []
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"a {type(entry).__name__} is no entry of a mapping")
        pairs.append((entry[0], entry[1]))
    # numbers in JSON may be of any size, and chosen to hash alike
    check_hashes(key for key, _ in pairs if not isinstance(key, (dict, list)))
    entries_by_key: dict[Any, tuple[Any, Tree]] = {}
    for json_key, child in pairs:
        identity = _identity(key := _key_from_json(json_key))
        if identity in entries_by_key:
            raise ValueError("a mapping in it has a key twice")
        entries_by_key[identity] = key, _tree_from_json(child, depth_left - 1)
    return mapping_node(kind, entries_by_key.values())


def _key_from_json(key: JSON) -> Any:
    if isinstance(key, dict):
        text, raw, plain = key.get("text"), key.get("pickle"), key.get("plain")
        if not (plain is None or (isinstance(plain, (str, int, float)) and not isinstance(plain, bool))):
            raise ValueError(f"a {type(plain).__name__} is no plain form of a key")
        if isinstance(text, str) and isinstance(raw, str):
            return PickledKey(text, base64.b64decode(raw, validate=True), plain)
        if isinstance(text, str) and raw is None and plain is not None:
            return PickledKey(text, None, plain)
    # an infinity or NaN among them is of an earlier release, which wrote it as a bare word
    if not isinstance(key, PLAIN_KEYS):
        raise ValueError(f"a {type(key).__name__} is no key")
    return key


def merged_trees(trees: Sequence[JSON]) -> JSON:
    """One tree of all that is in any of ``trees``, as ``tree_to_json`` encodes them: ranks may hold different
    parts of a state."""
    containers: list[Any] = [tree for tree in trees if tree is not None]
    if not containers:
        return None
    first = containers[0]
    # mostly each rank holds all of it: compared in C
    if all(other is first or other == first for other in containers):
        return cast(JSON, first)
    kind, entries = first[0], [tree[1] for tree in containers]
    if all(isinstance(entry, dict) for entry in entries):
        return [kind, _merged_entries(entries)]
    # all at once: pair by pair would look at what is merged already once per tree
    below: dict[Any, tuple[JSON, list[JSON]]] = {}
    for tree in containers:
        for key, child in _pairs(tree):
            below.setdefault(_identity(key), (key, []))[1].append(child)
    merged = [(key, merged_trees(children)) for key, children in below.values()]
    if kind == "list":
        return [kind, [child for _, child in merged]]
    if all(type(key) is str for key, _ in merged):
        return [kind, {str(key): child for key, child in merged}]
    return [kind, [[key, child] for key, child in merged]]


def _merged_entries(mappings: Sequence[dict[str, JSON]]) -> dict[str, JSON]:
    """Merge mappings whose keys are all str: entries that one tree alone has cost nothing."""
    merged: dict[str, JSON] = {}
    common: dict[str, list[JSON]] = {}
    for entries in mappings:
        for key in merged.keys() & entries.keys():
            common.setdefault(key, [merged[key]]).append(entries[key])
        merged.update(entries)
    merged.update((key, merged_trees(children)) for key, children in common.items())
    return merged


def _pairs(node: list[Any]) -> Iterable[tuple[JSON, JSON]]:
    """(key or index, node) of each child of a container, as ``tree_to_json`` encodes it."""
    kind, entries = node
    if kind == "list":
        return enumerate(entries)
    return entries.items() if isinstance(entries, dict) else ((key, child) for key, child in entries)


def _identity(key: Any) -> tuple[type, Any]:
    # 1, 1.0 and True are equal, but not the same key; NaN equals not even itself
    if isinstance(key, dict):
        return type(key), tuple(key.items())
    return type(key), key if key == key else "nan"


def dcp_paths(tree: JSON) -> dict[str, tuple[str | int, ...]]:
    """DCP's ``planner_data``: name -> path, as its ``flatten_state_dict`` gives it (str for keys, int in
    lists). ``tree`` as ``tree_to_json`` encodes it."""
    paths: dict[str, tuple[str | int, ...]] = {}

    def visit(node: Any, prefix: str, path: tuple[str | int, ...]) -> None:
        is_list = node[0] == "list"
        for key, child in _pairs(node):
            part: Any = key if is_list else key["text"] if isinstance(key, dict) else str(key)
            if child is None:
                paths[f"{prefix}{part}"] = (*path, part)
            else:
                visit(child, f"{prefix}{part}.", (*path, part))

    visit(tree, "", ())
    return paths
