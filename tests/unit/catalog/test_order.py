"""Which checkpoint is newer, told by steps, names and times."""

from __future__ import annotations

import itertools

import pytest

from dcp_async.catalog.order import ascending, family_of


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("checkpoint-10", ("checkpoint-", 10)),
        ("checkpoint-0010", ("checkpoint-", 10)),
        ("epoch=1-step=200", ("epoch=1-step=", 200)),
        ("v.12", ("v.", 12)),
        ("7", ("", 7)),
        ("9" * 240, ("", int("9" * 240))),
        ("loss-0.93", ("loss-0.93", -1)),
        ("final", ("final", -1)),
        ("7b", ("7b", -1)),
        ("step-\u0661", ("step-\u0661", -1)),
        ("", ("", -1)),
    ],
)
def test_the_digits_at_the_end_of_a_name_are_its_number(name: str, family: tuple[str, int]) -> None:
    assert family_of(name) == family


ORDERED = {
    "by digits": [("checkpoint-7", None, 9.0), ("checkpoint-10", None, 1.0), ("checkpoint-100", None, 5.0)],
    "by time": [("final", None, 1.0), ("best", None, 2.0), ("loss-0.93", None, 3.0), ("loss-0.5", None, 4.0)],
    "families": [
        ("best-3", None, 7.0),
        ("best-4", None, 1.0),
        ("checkpoint-7", None, 9.0),
        ("checkpoint-10", None, 2.0),
        ("final", None, 10.0),
    ],
    "steps": [
        ("checkpoint-900", None, 99.0),
        ("a", 1, 9.0),
        ("b", 2, 1.0),
        ("again", 2, 2.0),
        ("step-00000010", 10, 0.0),
    ],
}


@pytest.mark.parametrize("told", ORDERED.values(), ids=ORDERED)
def test_checkpoints_have_one_order_however_they_are_listed(
    told: list[tuple[str, int | None, float]],
) -> None:
    for listed in itertools.permutations(told):
        assert list(ascending(listed).items()) == [(name, step) for name, step, _ in told]
