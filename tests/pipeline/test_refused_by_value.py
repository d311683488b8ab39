"""What a load would refuse by its values is refused by the save, on which it is still there to be changed."""

from __future__ import annotations

import collections
import fractions
import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import SaveError, Trust
from dcp_async.sync import CheckpointEngine

PATH = pathlib.Path("/a")
MODULUS = 2**61 - 1
REASON = r"leaf: a \w+ (can be pickled, but not unpickled|could not be loaded) again"


def shared(times: int, value: Any) -> Any:
    for _ in range(times):
        value = (value, value)
    return value


REFUSED = {
    "parts that refer to each other": [shared(20, (1, 2))],
    "lists that do": [shared(18, [1, 2])],
    "the same around a class that is known": [(PATH,), shared(20, (PATH,))],
    "in a deque, after an honest one": [collections.deque([1]), collections.deque([shared(20, (1,))])],
    "numbers that hash alike": [{number * MODULUS for number in range(3000)}],
    "the same after an honest set": [{1, 2}, {number * MODULUS for number in range(3000)}],
    "in a frozenset": [frozenset({1}), frozenset(number * MODULUS for number in range(1500))],
    "as the keys of a dict in a tuple": [({number * MODULUS: 1 for number in range(3000)},)],
    "as the keys of an OrderedDict in a tuple": [
        (collections.OrderedDict(a=1),),
        (collections.OrderedDict((number * MODULUS, 1) for number in range(3000)),),
    ],
    "a fraction of endless numbers": [fractions.Fraction(1, 3), fractions.Fraction(3**50_000, 7)],
}
TAKEN = {
    "rows that are one list": [([list(range(100))] * 1000,)],
    "a large set of numbers": [set(range(5000)), {number / 7 for number in range(5000)}],
    "pairs": [{(number, number + 1) for number in range(5000)}],
    "large dicts in a tuple": [({number: str(number) for number in range(5000)},) * 3],
    "fractions": [fractions.Fraction(1, 3), fractions.Fraction(3**2000, 7**2000)],
    "deques in each other": [collections.deque(collections.deque([number]) for number in range(300))],
    "texts": [tuple(map(str, range(3000)))],
}


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_save_refuses_what_load_would_refuse_by_value(tmp_path: Path, values: list[Any]) -> None:
    with CheckpointEngine(tmp_path) as engine:
        for step, value in enumerate(values[:-1]):
            engine.save({"leaf": value, "t": torch.ones(2)}, step=step)
        with pytest.raises(SaveError, match=REASON):
            engine.save({"leaf": values[-1], "t": torch.ones(2)}, step=9)
        engine.wait()


@pytest.mark.parametrize("values", TAKEN.values(), ids=TAKEN)
def test_what_save_takes_comes_back(tmp_path: Path, values: list[Any]) -> None:
    with CheckpointEngine(tmp_path) as engine:
        for step, value in enumerate(values):
            for number in (2 * step, 2 * step + 1):  # the second time its bytes are known
                engine.save({"leaf": value}, step=number)
                engine.wait()
                assert engine.read(number)["leaf"] == value


def test_who_trusts_everything_is_refused_nothing(tmp_path: Path) -> None:
    value = {number * MODULUS for number in range(1500)}
    with CheckpointEngine(tmp_path, trust=Trust(unsafe=True)) as engine:
        engine.save({"leaf": value}, step=1)
        engine.wait()
        assert engine.read(1)["leaf"] == value
