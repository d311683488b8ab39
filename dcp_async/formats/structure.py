"""The tree of containers that was saved, as JSON in the manifest: keys and kinds that DCP's dotted names
lose.

A leaf is null; a mapping is [kind, {key: node}], or [kind, [[key, node], ...]] if a key is no str; a list is
["list", [node, ...]]. Leaves have no name of their own: it follows from the path. Enters and leaves: such
trees.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

MAPPING_KINDS: dict[type, str] = {dict: "dict", OrderedDict: "odict", Counter: "counter"}
"""Exact types that come back as themselves; any other mapping comes back as a dict."""


def mapping_node(kind: str, children: Mapping[Any, JSON]) -> JSON:
    """The node of a mapping."""
    if all(type(key) is str for key in children):
        return [kind, dict(children)]
    return [kind, [[_json_key(key), child] for key, child in children.items()]]


def list_node(children: list[JSON]) -> JSON:
    """The node of a list."""
    return ["list", children]


def _json_key(key: object) -> JSON:
    return key if isinstance(key, (str, bool, int, float)) or key is None else str(key)


def kind_of(node: JSON) -> str | None:
    """The kind of a container, None for a leaf."""
    return cast("str", node[0]) if isinstance(node, list) else None


def children_of(node: JSON) -> list[tuple[Any, JSON]]:
    """(key or index, node) of each child; none of a leaf."""
    if not isinstance(node, list):
        return []
    kind, entries = cast("tuple[str, Any]", tuple(node))
    if kind == "list":
        return list(enumerate(entries))
    return list(entries.items()) if isinstance(entries, dict) else [(key, child) for key, child in entries]


def build(node: JSON, leaf: Callable[[str], Any], name: str = "") -> Any:
    """Containers as they were, with ``leaf(name)`` at the leaves. ``name`` is where ``node`` lies."""
    kind = kind_of(node)
    if kind is None:
        return leaf(name)
    prefix = f"{name}." if name else ""
    made = [(key, build(child, leaf, f"{prefix}{key}")) for key, child in children_of(node)]
    if kind == "list":
        return [value for _, value in made]
    if kind == "odict":
        return OrderedDict(made)
    return Counter(dict(made)) if kind == "counter" else dict(made)


def subtree(node: JSON, name: str, prefix: str = "") -> JSON:
    """The node at ``name``, None if there is none (or a leaf). Keys may have dots, so every fitting child is
    tried."""
    if name == prefix:
        return node
    for key, child in children_of(node):
        below = f"{prefix}.{key}" if prefix else str(key)
        if name == below or name.startswith(f"{below}."):
            found = subtree(child, name, below)
            if found is not None:
                return found
    return None


def structure_from_paths(planner_data: object, names: list[str]) -> JSON:
    """The tree that DCP's name -> path mapping describes (all its keys are str); a flat one where there is
    none."""
    paths = planner_data if isinstance(planner_data, dict) else {}
    root: dict[str | int, Any] = {}
    for name in names:
        path = paths.get(name, (name,))
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = None

    def encode(node: dict[str | int, Any] | None) -> JSON:
        if node is None:
            return None
        if node and all(isinstance(key, int) for key in node):
            # a list; stock drops empty containers, which leave holes in it
            last = max(cast("dict[int, Any]", node))
            return list_node([encode(node.get(index, {})) for index in range(last + 1)])
        return mapping_node("dict", {str(key): encode(child) for key, child in node.items()})

    return encode(root)
