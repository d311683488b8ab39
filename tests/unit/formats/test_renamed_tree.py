"""A renamed tree keeps the keys and kinds of what its names have kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dcp_async.formats import Tree, leaf_names, renamed_paths, renamed_tree

MODULE: Tree = ["odict@stateful", [["0.weight", None], ["0.bias", None]]]
OPTIM: Tree = ["dict", [["state", ["dict", [[0, ["dict", [["step", None]]]]]]], ["empty", ["dict", []]]]]
LIST: Tree = ["list", [None, ["dict", [["a", None]]], None]]
TREE: Tree = ["dict", [["module", MODULE], ["optim", OPTIM], ["list", LIST]]]
"""Keys that are no text, keys with dots, an empty container, a list."""


def keep(name: str) -> str:
    return name


def test_a_tree_under_its_own_names_is_the_same() -> None:
    assert renamed_tree(TREE, keep) == TREE


@pytest.mark.parametrize(
    ("rename", "node"),
    [
        # a prefix goes: what is left lies at the top, its key with dots still one key
        (lambda name: name.removeprefix("module."), ["0.weight", None]),
        # a prefix comes, cut at its dots
        (
            lambda name: f"a.b.{name}" if name.startswith("module") else name,
            ["a", ["dict", [["b", ["dict", [["module", MODULE]]]]]]],
        ),
        # a part of a key with dots is replaced, and it stays one key
        (
            lambda name: name.replace("0.", "block.9.") if name.startswith("module") else name,
            ["module", ["odict@stateful", [["block.9.weight", None], ["block.9.bias", None]]]],
        ),
        # a number stays one, its mapping keeps its kind
        (
            lambda name: name.replace("optim.", "adam."),
            ["adam", OPTIM],
        ),
    ],
)
def test_keys_and_kinds_that_a_name_keeps_stay(rename: Callable[[str], str], node: list[object]) -> None:
    tree = renamed_tree(TREE, rename)
    assert tree is not None
    assert node in tree[1]
    assert sorted(leaf_names(tree)) == sorted(map(rename, leaf_names(TREE)))


def test_a_list_of_which_a_part_is_taken_keeps_its_indices() -> None:
    tree = renamed_tree(TREE, lambda name: name if name == "list.2" else None)
    assert tree == ["dict", [["list", ["list", [["dict", []], ["dict", []], None]]]]]


@pytest.mark.parametrize("new", ["module", "list.0.deep"])
def test_names_that_can_not_be_in_one_tree_are_refused(new: str) -> None:
    with pytest.raises(ValueError, match="would lie"):
        renamed_tree(TREE, lambda name: new if name == "optim.state.0.step" else name)


def test_paths_of_stock_keep_their_numbers() -> None:
    paths: dict[str, tuple[str | int, ...]] = {"module.l.0.w": ("module", "l", 0, "w")}
    assert renamed_paths(paths, {"module.l.0.w": "l.0.w", "flat.w": "w"}) == {
        "l.0.w": ("l", 0, "w"),
        "w": ("w",),
    }
