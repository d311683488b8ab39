"""The tree of containers that was saved: keys and kinds that DCP's dotted names lose.

A leaf is None; a mapping is [kind, [[key, node], ...]], a list ["list", [node, ...]]. Leaves have no name of
their own: it follows from the path. The manifest holds the tree as JSON: there a mapping whose keys are all
str is [kind, {key: node}], and a key that JSON has no word for is {"text": str(key), "pickle": base64}; a key
of a class that extends str, int or float also has "plain", its value without that class. Such a key stays a
PickledKey until ``build`` needs it, so that nothing is unpickled to look at a tree.
"""

from __future__ import annotations

import base64
import math
import pickle
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from ..info import JSON
from ..trust import check_hashes

Tree: TypeAlias = "list[Any] | None"

_KINDS: dict[type, str] = {dict: "dict", OrderedDict: "odict", Counter: "counter"}
_FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (bool, bytes, dict, float, int, list, set, str, tuple)
}
_OF_STATEFUL = "@stateful"
"""Ends the kind of a mapping that a ``state_dict()`` gave: a load can tell by it where objects were. Releases
that do not know it read a plain dict."""
_PLAIN_KEYS = (str, bool, int, float, type(None))


def _has_json(key: object) -> bool:
    """Whether JSON has a word for ``key`` itself: for an infinity or NaN it has none."""
    return type(key) in _PLAIN_KEYS and not _is_non_finite(key)


def _is_non_finite(key: object) -> bool:
    return isinstance(key, float) and not math.isfinite(key)


@dataclass(frozen=True, slots=True)
class PickledKey:
    """A mapping's key that is still pickled."""

    text: str
    """Its ``str()``, which names are made of."""
    raw: bytes | None
    """None if only ``plain`` is known of it: its class can't be pickled."""
    plain: str | int | float | None = None
    """What it is where its class is not trusted: an enum of text is that text."""

    def __str__(self) -> str:
        return self.text


def text_of(key: object) -> str:
    """What names are made of, as DCP makes them: ``str(key)``, and never of a subclass."""
    return key if type(key) is str else str.__str__(str(key))


def plain_key(key: object) -> str | int | float | None:
    """The value of a key whose class extends str, int or float; None of any other."""
    if isinstance(key, str):
        return str.__str__(key)
    if isinstance(key, int):
        return int.__int__(key)
    return float.__float__(key) if isinstance(key, float) else None


def mapping_kind(mapping: Mapping[Any, Any]) -> str:
    """What ``mapping`` comes back as: a dict, if it is of no kind that is known here."""
    kind = _KINDS.get(type(mapping))
    if kind is not None:
        return kind
    if type(mapping) is defaultdict:
        factory = mapping.default_factory
        name = "" if factory is None else getattr(factory, "__name__", "?")
        if factory is None or _FACTORIES.get(name) is factory:
            return f"defaultdict:{name}"
    return "dict"


def kind_of_stateful(kind: str) -> str:
    """``kind``, of a mapping that a ``state_dict()`` gave."""
    return kind + _OF_STATEFUL


def is_of_stateful(node: Tree) -> bool:
    """Whether a ``state_dict()`` gave it. Of what older releases and stock wrote, nothing tells."""
    return node is not None and node[0].endswith(_OF_STATEFUL)


def make_mapping(kind: str, entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping of ``kind`` with ``entries``."""
    made = dict(entries)
    kind = kind.removesuffix(_OF_STATEFUL)
    if kind == "odict":
        return OrderedDict(made)
    if kind == "counter":
        return Counter(made)
    if kind.startswith("defaultdict:"):
        return defaultdict(_FACTORIES.get(kind.partition(":")[2]), made)
    return made


def mapping_node(kind: str, children: Iterable[tuple[Any, Tree]]) -> Tree:
    """The node of a mapping."""
    return [kind, [[key, child] for key, child in children]]


def list_node(children: list[Tree]) -> Tree:
    """The node of a list."""
    return ["list", children]


def pickled_key(key: object) -> bytes | None:
    """The pickle of a key that JSON has no word for; None of any other, and of one that can do without.

    Raises what its pickling raises.
    ."""
    if _has_json(key):
        return None
    try:
        return pickle.dumps(key, protocol=2)
    except Exception:  # pickling runs the key's own code, which may raise anything
        plain = plain_key(key)
        if plain is None:
            raise
        return pickle.dumps(plain, protocol=2) if _is_non_finite(plain) else None


def tree_to_json(node: Tree) -> JSON:
    """``node`` as the manifest holds it."""
    if node is None:
        return None
    kind, entries = node
    if kind == "list":
        return [kind, [tree_to_json(child) for child in entries]]
    if all(type(key) is str for key, _ in entries):
        return [kind, {key: tree_to_json(child) for key, child in entries}]
    return [kind, [[_key_to_json(key), tree_to_json(child)] for key, child in entries]]


def _key_to_json(key: Any) -> JSON:
    if _has_json(key):
        return cast(JSON, key)
    if isinstance(key, PickledKey):
        raw, plain = key.raw, key.plain
    else:
        raw, plain = pickled_key(key), plain_key(key)
    encoded: dict[str, JSON] = {"text": text_of(key)}
    if raw is not None:
        encoded["pickle"] = base64.b64encode(raw).decode()
    if plain is not None and not _is_non_finite(plain):
        encoded["plain"] = plain
    return encoded


MAX_TREE_DEPTH = 300
"""Of containers in each other: what every walk over a tree manages within CPython's recursion limit."""


def tree_from_json(node: JSON) -> Tree:
    """The inverse of ``tree_to_json``, but for keys that were pickled.

    Raises: ValueError for what is no tree of containers within MAX_TREE_DEPTH.
    """
    if node is None:
        raise ValueError("there is nothing in it")
    return _tree_from_json(node, MAX_TREE_DEPTH)


def _tree_from_json(node: JSON, depth_left: int) -> Tree:
    if node is None:
        return None
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
    check_hashes(key for key, _ in pairs if not isinstance(key, (dict, list)))
    found: dict[Any, tuple[Any, Tree]] = {}
    for json_key, child in pairs:
        identity = _identity(key := _key_from_json(json_key))
        if identity in found:
            raise ValueError("a mapping in it has a key twice")
        found[identity] = key, _tree_from_json(child, depth_left - 1)
    return mapping_node(kind, found.values())


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
    if not isinstance(key, _PLAIN_KEYS):
        raise ValueError(f"a {type(key).__name__} is no key")
    return key


def kind_of(node: Tree) -> str | None:
    """The kind of a container, None for a leaf."""
    return cast("str", node[0]) if node is not None else None


def children_of(node: Tree) -> list[tuple[Any, Tree]]:
    """(key or index, node) of each child; none of a leaf."""
    if node is None:
        return []
    kind, entries = node
    return list(enumerate(entries)) if kind == "list" else [(key, child) for key, child in entries]


def _join(name: str | None, key: object) -> str:
    """The name of a child; ``name`` is None for the root, since "" is a key like any other."""
    return text_of(key) if name is None else f"{name}.{text_of(key)}"


def build(
    node: Tree, leaf: Callable[[str], Any], unpickle: Callable[[PickledKey], Any], name: str | None = None
) -> Any:
    """Containers as they were, with ``leaf(name)`` at the leaves. ``name`` is where ``node`` lies, None for
    the root."""
    kind = kind_of(node)
    if kind is None:
        assert name is not None
        return leaf(name)
    made = [
        (
            unpickle(key) if isinstance(key, PickledKey) else key,
            build(child, leaf, unpickle, _join(name, key)),
        )
        for key, child in children_of(node)
    ]
    return [value for _, value in made] if kind == "list" else make_mapping(kind, made)


def leaf_names(node: Tree, name: str | None = None) -> list[str]:
    """The names of a node's leaves; ``name`` is where it lies, None for the root."""
    if node is None:
        assert name is not None
        return [name]
    return [leaf for key, child in children_of(node) for leaf in leaf_names(child, _join(name, key))]


def pickled_keys(node: Tree) -> list[PickledKey]:
    """Every key in a tree that is still pickled."""
    found = []
    for key, child in children_of(node):
        if isinstance(key, PickledKey):
            found.append(key)
        found += pickled_keys(child)
    return found


def heads_of(name: str) -> list[str]:
    """``name`` and everything that it lies below."""
    return [name[:at] for at, letter in enumerate(name) if letter == "."] + [name]


def pruned(node: Tree, keys: Collection[str]) -> tuple[Tree, set[str]]:
    """What of a container lies at or below ``keys``, whole, with the containers on the way there; and the
    keys for which there is something."""
    wanted = set(keys)
    above = {head for key in keys for head in heads_of(key)}
    found: set[str] = set()

    def prune(node: Tree, name: str | None) -> Tree:
        kept: list[tuple[Any, Tree]] = []
        for key, child in children_of(node):
            below = _join(name, key)
            if met := wanted.intersection(heads_of(below)):
                found.update(met)
                kept.append((key, child))
            elif child is not None and below in above:
                inner = prune(child, below)
                if children_of(inner):
                    kept.append((key, inner))
        kind = kind_of(node) or "dict"
        return list_node([child for _, child in kept]) if kind == "list" else mapping_node(kind, kept)

    def mark(node: Tree, name: str) -> None:
        """Keys below one that was asked for as well."""
        for key, child in children_of(node):
            below = _join(name, key)
            found.update(wanted & {below})
            if below in above:
                mark(child, below)

    tree = prune(node, None)
    for key, child in children_of(tree):
        mark(child, text_of(key))
    return tree, found


def subtree(node: Tree, name: str, prefix: str | None = None) -> Tree:
    """The node at ``name``, None if there is none (or a leaf). Keys may have dots, so every fitting child is
    tried."""
    if name == prefix:
        return node
    for key, child in children_of(node):
        below = _join(prefix, key)
        if name == below or name.startswith(f"{below}."):
            found = subtree(child, name, below)
            if found is not None:
                return found
    return None


def locate(node: Tree, name: str, prefix: str | None = None) -> tuple[bool, Tree]:
    """Whether there is a node at ``name``, and which: None is that of a leaf."""
    for key, child in children_of(node):
        below = _join(prefix, key)
        if name == below:
            return True, child
        if name.startswith(f"{below}."):
            found, inner = locate(child, name, below)
            if found:
                return True, inner
    return False, None


def cut(node: Tree, at: Collection[str], name: str) -> Tree:
    """``node``, which lies at ``name``, with a leaf in place of each node whose name is in ``at``."""
    if name in at or node is None:
        return None
    kind, entries = node
    if kind == "list":
        return [kind, [cut(child, at, _join(name, key)) for key, child in enumerate(entries)]]
    return [kind, [[key, cut(child, at, _join(name, key))] for key, child in entries]]


def like(node: Tree, value: Any) -> Tree:
    """``node`` with the keys and kinds that ``value`` has where both have a container: stock writes all keys
    as text. An empty container that ``node`` lacks, since stock drops those, is added."""
    if node is None or not isinstance(value, (Mapping, list)):
        return node
    if isinstance(value, list):
        if node[0] != "list":
            return node
        entries = [like(child, value[at]) if at < len(value) else child for at, child in enumerate(node[1])]
        return list_node(entries)
    if node[0] == "list":
        return node
    keys = {str(key): key for key in value}
    children = []
    for key, child in node[1]:
        own = keys.pop(str(key), key)
        children.append((own, like(child, value[own]) if own in value else child))
    empty = [(key, entry) for key, entry in value.items() if str(key) in keys and not _has_leaf(entry)]
    children += [(key, _of_empty(entry)) for key, entry in empty]
    if empty and len(children) == len(value):  # where the empty ones stood nobody has written down
        found = {str(key): (key, child) for key, child in children}
        children = [found[str(key)] for key in value]
    return mapping_node(mapping_kind(value), children)


def grafted(node: Tree, value: Any, wanted: Collection[str], name: str) -> Tree:
    """``node``, which lies at ``name``, and besides the leaves of ``value`` that are ``wanted``, in its
    mappings."""
    if name in wanted or not isinstance(value, Mapping):
        return node
    known = {str(key): (key, child) for key, child in children_of(node)}
    for key, entry in value.items():
        below = _join(name, key)
        if below in wanted or any(each.startswith(f"{below}.") for each in wanted):
            old = known.get(str(key), (key, None))
            known[str(key)] = (old[0], grafted(old[1], entry, wanted, below))
    return mapping_node(kind_of(node) or "dict", known.values())


def _has_leaf(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_leaf, value.values()))
    return not isinstance(value, list) or not value or any(map(_has_leaf, value))


def _of_empty(value: Any) -> Tree:
    if isinstance(value, Mapping):
        return mapping_node(mapping_kind(value), ((key, _of_empty(entry)) for key, entry in value.items()))
    return list_node([_of_empty(entry) for entry in value])


def merged_trees(trees: Sequence[JSON]) -> JSON:
    """One tree of all that is in any of ``trees``, as ``tree_to_json`` encodes them: ranks may hold different
    parts of a state."""
    containers: list[Any] = [tree for tree in trees if tree is not None]
    if not containers:
        return None
    first = containers[0]
    if all(other is first or other == first for other in containers):
        return cast(JSON, first)
    kind, entries = first[0], [tree[1] for tree in containers]
    if all(isinstance(each, dict) for each in entries):
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
    """The same for mappings whose keys are all str: those that one tree alone has cost nothing."""
    found: dict[str, JSON] = {}
    common: dict[str, list[JSON]] = {}
    for entries in mappings:
        for key in found.keys() & entries.keys():
            common.setdefault(key, [found[key]]).append(entries[key])
        found.update(entries)
    found.update((key, merged_trees(children)) for key, children in common.items())
    return found


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


_MAX_HOLES = 1 << 17


def structure_from_paths(planner_data: object, names: list[str]) -> Tree:
    """The tree that DCP's name -> path mapping describes (all its keys are str); a flat one where there is
    none. A list that would be nothing but holes, so many that memory may not last, stays a mapping."""
    paths = planner_data if isinstance(planner_data, dict) else {}
    root: dict[str | int, Any] = {}
    for name in names:
        path = paths.get(name, (name,))
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = None

    holes_left = _MAX_HOLES

    def encode(node: dict[str | int, Any] | None) -> Tree:
        nonlocal holes_left
        if node is None:
            return None
        last = max(cast("dict[int, Any]", node)) if all(isinstance(key, int) for key in node) and node else -1
        if last >= 0 and last + 1 - len(node) <= holes_left:
            # a list; stock drops empty containers, which leave holes in it
            holes_left -= last + 1 - len(node)
            return list_node([encode(node.get(index, {})) for index in range(last + 1)])
        return mapping_node("dict", ((str(key), encode(child)) for key, child in node.items()))

    return encode(root)
