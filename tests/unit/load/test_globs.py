"""Patterns of names match whole subtrees, and a mapping of them gives each name one new one."""

from __future__ import annotations

import pytest

from dcp_async.load.globs import Glob, Substitution


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("model", ["model", "model.w", "model.a.b"], ["models", "a.model", "modelw"]),
        ("model.*", ["model.w", "model.a.b"], ["model", "models.w"]),
        ("*.weight", ["a.weight", "a.b.weight", "a.weight.scale"], ["weight", "a.weights"]),
        ("layers.?", ["layers.1", "layers.1.w"], ["layers.10", "layers"]),
        ("layers.[13].w", ["layers.1.w", "layers.3.w"], ["layers.2.w"]),
        ("layers.[!13]", ["layers.2.w"], ["layers.1.w"]),
        ("odd[0]", ["odd[0]", "odd[0].w", "odd0"], ["odd"]),
        ("*", ["a", "a.b"], []),
    ],
)
def test_a_pattern_means_what_lies_at_and_below_what_it_matches(
    pattern: str, matched: list[str], others: list[str]
) -> None:
    glob = Glob(pattern)
    assert [name for name in matched if not glob.matches(name)] == []
    assert [name for name in others if glob.matches(name)] == []


@pytest.mark.parametrize(
    ("old", "new", "name", "renamed"),
    [
        ("module.*", "*", "module.a.w", "a.w"),
        ("*", "module.*", "a.w", "module.a.w"),
        ("enc.*", "*.enc", "enc.a.b", "a.b.enc"),
        ("old", "new", "old.a.w", "new.a.w"),
        ("old", "new", "older.w", "older.w"),
        ("layers.*.attn", "blocks.*.attention", "layers.3.attn.q.w", "blocks.3.attention.q.w"),
        ("l.?.w", "m.*.w", "l.7.w", "m.7.w"),
        ("l[12].*", "m.*.*", "l2.w", "m.2.w"),
        ("l[!12].*", "m.*.*", "l2.w", "l2.w"),
        ("l[^].*", "m.*.*", "l^.w", "m.^.w"),
        ("a.*.b.*", "*/*", "a.x.b.y.b.z", "x/y.b.z"),
    ],
)
def test_a_substitution_puts_what_wildcards_matched_into_the_new_name(
    old: str, new: str, name: str, renamed: str
) -> None:
    assert Substitution({old: new})(name) == renamed


def test_the_first_pattern_that_matches_renames() -> None:
    rename = Substitution({"model.encoder.*": "enc.*", "model.*": "*"})
    assert [rename("model.encoder.w"), rename("model.head.w")] == ["enc.w", "head.w"]


@pytest.mark.parametrize("patterns", [{"a.*": "b"}, {"a": "b.*"}, {"a.*.*": "*"}, {"[z-a]": "*"}])
def test_a_substitution_that_can_not_be_is_refused(patterns: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"each wildcard on the left|is no pattern"):
        Substitution(patterns)


def test_a_pattern_that_renames_nothing_is_named() -> None:
    rename = Substitution({"a.*": "b.*", "c.*": "d.*"})
    with pytest.raises(ValueError, match=r"'c\.\*' of rename"):
        rename.check_used(["a.w"])
