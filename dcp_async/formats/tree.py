"""The tree of containers that was saved: keys and kinds that DCP's dotted names lose.

A leaf is None; a mapping is [kind, [[key, node], ...]], a list ["list", [node, ...]]. Leaves have no name of
their own: it follows from the path. A key that is no text stays a PickledKey until ``build`` needs it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, cast

from .keys import PickledKey, text_of

Tree: TypeAlias = "list[Any] | None"

_KINDS: dict[type, str] = {dict: "dict", OrderedDict: "odict", Counter: "counter"}
_FACTORIES: dict[str, Callable[[], Any]] = {
    factory.__name__: factory for factory in (bool, bytes, dict, float, int, list, set, str, tuple)
}
_STATEFUL_SUFFIX = "@stateful"
"""Ends the kind of a mapping that a ``state_dict()`` gave: a load can tell by it where objects were. Releases
that do not know it read a plain dict."""


def mapping_kind(mapping: Mapping[Any, Any]) -> str:
    """What ``mapping`` comes back as: a dict, if it is of no kind that is known here."""
    # by exact type: a class of the user's would have to be imported, and asked how it is made
    kind = _KINDS.get(type(mapping))
    if kind is not None:
        return kind
    if type(mapping) is defaultdict:
        factory = mapping.default_factory
        name = "" if factory is None else getattr(factory, "__name__", "?")
        # by identity: a function of the user's may be called list as well
        if factory is None or _FACTORIES.get(name) is factory:
            return f"defaultdict:{name}"
    return "dict"


def kind_of_stateful(kind: str) -> str:
    """``kind``, of a mapping that a ``state_dict()`` gave."""
    return kind + _STATEFUL_SUFFIX


def is_of_stateful(node: Tree) -> bool:
    """Whether a ``state_dict()`` gave it. Of what older releases and stock wrote, nothing tells."""
    return node is not None and node[0].endswith(_STATEFUL_SUFFIX)


def make_mapping(kind: str, entries: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a mapping of ``kind`` with ``entries``."""
    # a Counter of pairs would count the pairs
    made = dict(entries)
    kind = kind.removesuffix(_STATEFUL_SUFFIX)
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


def kind_of(node: Tree) -> str | None:
    """The kind of a container, None for a leaf."""
    return cast("str", node[0]) if node is not None else None


def children_of(node: Tree) -> list[tuple[Any, Tree]]:
    """(key or index, node) of each child; none of a leaf."""
    if node is None:
        return []
    kind, entries = node
    return list(enumerate(entries)) if kind == "list" else [(key, child) for key, child in entries]


def child_name(name: str | None, key: object) -> str:
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
            build(child, leaf, unpickle, child_name(name, key)),
        )
        for key, child in children_of(node)
    ]
    return [value for _, value in made] if kind == "list" else make_mapping(kind, made)


def leaf_names(node: Tree, name: str | None = None) -> list[str]:
    """The names of a node's leaves; ``name`` is where it lies, None for the root."""
    if node is None:
        assert name is not None
        return [name]
    return [leaf for key, child in children_of(node) for leaf in leaf_names(child, child_name(name, key))]


def pickled_keys(node: Tree) -> list[PickledKey]:
    """Every key in a tree that is still pickled."""
    pickled = []
    for key, child in children_of(node):
        if isinstance(key, PickledKey):
            pickled.append(key)
        pickled += pickled_keys(child)
    return pickled


def heads_of(name: str) -> list[str]:
    """``name`` and everything that it lies below."""
    # each dot: whether it parts two keys or lies within one, the name does not tell
    return [name[:end] for end, letter in enumerate(name) if letter == "."] + [name]


def pruned(node: Tree, keys: Collection[str]) -> tuple[Tree, set[str]]:
    """What lies at or below ``keys`` in a container, with the containers on the way; and the keys that it
    has."""
    wanted = set(keys)
    above = {head for key in keys for head in heads_of(key)}
    present: set[str] = set()

    def prune(node: Tree, name: str | None) -> Tree:
        kept: list[tuple[Any, Tree]] = []
        for key, child in children_of(node):
            below = child_name(name, key)
            if met := wanted.intersection(heads_of(below)):
                present.update(met)
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
            below = child_name(name, key)
            present.update(wanted & {below})
            if below in above:
                mark(child, below)

    tree = prune(node, None)
    for key, child in children_of(tree):
        mark(child, text_of(key))
    return tree, present


def subtree(node: Tree, name: str, prefix: str | None = None) -> Tree:
    """The node at ``name``, None if there is none (or a leaf). Keys may have dots, so every fitting child is
    tried."""
    if name == prefix:
        return node
    for key, child in children_of(node):
        below = child_name(prefix, key)
        # "a.b" may be one key or two, so a branch that fits may still lead nowhere
        if name == below or name.startswith(f"{below}."):
            inner = subtree(child, name, below)
            if inner is not None:
                return inner
    return None


def locate(node: Tree, name: str, prefix: str | None = None) -> tuple[bool, Tree]:
    """Whether there is a node at ``name``, and which: None is that of a leaf."""
    for key, child in children_of(node):
        below = child_name(prefix, key)
        if name == below:
            return True, child
        if name.startswith(f"{below}."):
            is_there, inner = locate(child, name, below)
            # else the next child that fits: keys may have dots
            if is_there:
                return True, inner
    return False, None


def cut(node: Tree, leaves: Collection[str], name: str) -> Tree:
    """``node``, which lies at ``name``, with a leaf in place of each node that ``leaves`` names."""
    if name in leaves or node is None:
        return None
    kind, entries = node
    if kind == "list":
        return [kind, [cut(child, leaves, child_name(name, key)) for key, child in enumerate(entries)]]
    return [kind, [[key, cut(child, leaves, child_name(name, key))] for key, child in entries]]


def like(node: Tree, value: Any) -> Tree:
    """``node`` with the keys and kinds that ``value`` has where both have a container: stock writes all keys
    as text. An empty container that ``node`` lacks, since stock drops those, is added."""
    if node is None or not isinstance(value, (Mapping, list)):
        return node
    if isinstance(value, list):
        if node[0] != "list":
            return node
        both = min(len(node[1]), len(value))
        rest = value[both:]
        beyond = [] if any(map(_has_leaf, rest)) else map(_of_empty, rest)
        return list_node([*map(like, node[1][:both], value), *node[1][both:], *beyond])
    if node[0] == "list":
        return node
    # by text, which is all that stock has kept of a key
    keys = {str(key): key for key in value}
    children = []
    for key, child in node[1]:
        own = keys.pop(str(key), key)
        children.append((own, like(child, value[own]) if own in value else child))
    empty = [(key, entry) for key, entry in value.items() if str(key) in keys and not _has_leaf(entry)]
    children += [(key, _of_empty(entry)) for key, entry in empty]
    if empty and len(children) == len(value):  # where the empty ones stood nobody has written down
        by_text = {str(key): (key, child) for key, child in children}
        children = [by_text[str(key)] for key in value]
    return mapping_node(mapping_kind(value), children)


def grafted(node: Tree, value: Any, wanted: Collection[str], name: str) -> Tree:
    """``node``, which lies at ``name``, and besides the leaves of ``value`` that are ``wanted``, in its
    mappings."""
    if name in wanted or not isinstance(value, Mapping):
        return node
    known = {str(key): (key, child) for key, child in children_of(node)}
    for key, entry in value.items():
        below = child_name(name, key)
        if below in wanted or any(other.startswith(f"{below}.") for other in wanted):
            old = known.get(str(key), (key, None))
            known[str(key)] = (old[0], grafted(old[1], entry, wanted, below))
    return mapping_node(kind_of(node) or "dict", known.values())


def _has_leaf(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_leaf, value.values()))
    # an empty list is a leaf to stock, an empty mapping leaves nothing
    return not isinstance(value, list) or not value or any(map(_has_leaf, value))


def _of_empty(value: Any) -> Tree:
    if isinstance(value, Mapping):
        return mapping_node(mapping_kind(value), ((key, _of_empty(entry)) for key, entry in value.items()))
    return list_node([_of_empty(entry) for entry in value])


_MAX_HOLES = 1 << 17


def tree_from_paths(planner_data: object, names: list[str]) -> Tree:
    """The tree that DCP's name -> path mapping describes (all its keys are str); a flat one where there is
    none. A list that would be nothing but holes, so many that memory may not last, stays a mapping."""
    paths = planner_data if isinstance(planner_data, dict) else {}
    root: dict[str | int, Any] = {}
    for name in names:
        path = paths.get(name, (name,))
        node = root
        for key in path[:-1]:
            # no path leads through the end of another: whoever gives them has seen to it (usable_paths)
            node = node.setdefault(key, {})
        node[path[-1]] = None

    holes_left = _MAX_HOLES

    def encode(node: dict[str | int, Any] | None) -> Tree:
        nonlocal holes_left
        if node is None:
            return None
        # in DCP's paths a number is an index; a mapping's key is text
        last = max(cast("dict[int, Any]", node)) if all(isinstance(key, int) for key in node) and node else -1
        if last >= 0 and last + 1 - len(node) <= holes_left:
            # a list; stock drops empty containers, which leave holes in it
            holes_left -= last + 1 - len(node)
            return list_node([encode(node.get(index, {})) for index in range(last + 1)])
        return mapping_node("dict", ((str(key), encode(child)) for key, child in node.items()))

    return encode(root)
