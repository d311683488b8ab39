"""Keys of any class that extends text or a number name what lies below them as DCP names it, on any number of
ranks, and come back: of their class where that is trusted, else as the plain value."""

from __future__ import annotations

import enum
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from dcp_async import CheckpointEngine, IncompatibleStateError, SaveError, Trust
from dcp_async.planning.local_plan import make_local_plan, unpack_tensors, unpack_tree
from dcp_async.state.capture import capture
from dcp_async.trust.plain_data import dumps, loads
from tests.support.doubles import assert_same


class Part(enum.StrEnum):
    MODEL = "model"
    OPTIM = "optim"


class Mixed(str, enum.Enum):  # noqa: UP042  # which is another thing than StrEnum, and older
    MODEL = "model"


class Text(str):
    __slots__ = ()


class Liar(str):
    __slots__ = ()

    def __str__(self) -> str:
        return Text(f"not {str.__str__(self)}")


class Level(enum.IntEnum):
    ONE = 1


class Number(int):
    def __str__(self) -> str:
        return f"number {int(self)}"


TOP: dict[str, tuple[Any, str]] = {
    "StrEnum": (Part.MODEL, "model"),
    "(str, Enum)": (Mixed.MODEL, "Mixed.MODEL"),
    "numpy.str_": (np.str_("model"), "model"),
    "a class of text": (Text("model"), "model"),
    "a class whose str() is another": (Liar("model"), "not model"),
}
INSIDE: dict[str, tuple[Any, str]] = {
    **TOP,
    "IntEnum": (Level.ONE, "1"),
    "a class of int": (Number(3), "number 3"),
    "bool": (True, "True"),
    "numpy.int64": (np.int64(7), "7"),
    "numpy.float64": (np.float64(0.5), "0.5"),
    "None": (None, "None"),
}
TRUST = Trust(safe_globals=(Part, Mixed, Text, Liar, Level, Number))


def _keys(value: Any) -> list[Any]:
    return [(type(key), key) for key in value]


@pytest.mark.parametrize("case", TOP)
async def test_a_top_level_key_is_saved_and_loaded(root: Path, case: str) -> None:
    key, text = TOP[case]
    async with CheckpointEngine(root, trust=TRUST) as engine:
        for step in range(3):
            state = {key: {"w": torch.full((3,), float(step))}, "step": step}
            info = await (await engine.save(state, step=step)).upload_completion
        names = (await info.metadata()).state_dict_metadata
        assert sorted(names) == sorted([f"{text}.w", "step"])
        assert all(type(name) is str for name in names)
        target = {key: {"w": torch.zeros(3)}, "step": 0}
        await engine.load(target)
        assert_same(target, state)
        found = await engine.read()
        assert _keys(found) == _keys(state)
        assert_same(await engine.read(keys=[text]), {key: state[key]})


@pytest.mark.parametrize("case", INSIDE)
async def test_a_key_inside_comes_back_of_its_class_where_that_is_trusted(root: Path, case: str) -> None:
    key, text = INSIDE[case]
    state = {"m": {key: torch.ones(2), "other": {key: 1}, "l": [{key: torch.zeros(1)}]}}
    async with CheckpointEngine(root, trust=TRUST) as engine:
        info = await (await engine.save(state)).upload_completion
        assert f"m.{text}" in (await info.metadata()).state_dict_metadata
        found = await engine.read()
        assert_same(found, state)
        assert [_keys(found["m"]), _keys(found["m"]["other"])] == [_keys(state["m"]), _keys({key: 1})]


@pytest.mark.parametrize("case", TOP)
async def test_a_key_whose_class_is_not_trusted_comes_back_as_its_text(root: Path, case: str) -> None:
    key, text = TOP[case]
    async with CheckpointEngine(root) as engine:
        await (await engine.save({key: {key: torch.ones(2)}})).upload_completion
        found = await engine.read()
        assert found[str.__str__(key)][str.__str__(key)].tolist() == [1, 1]
        assert list(await engine.read(keys=[f"{text}.{text}"])) == [key]


@pytest.mark.parametrize(("key", "plain"), [(Level.ONE, 1), (Number(3), 3)])
async def test_a_number_whose_class_is_not_trusted_comes_back_as_a_number(
    root: Path, key: Any, plain: int
) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"m": {key: torch.ones(2)}})).upload_completion
        assert _keys((await engine.read())["m"]) == [(int, plain)]


async def test_a_key_of_a_class_that_cannot_be_pickled_is_kept_as_its_value(root: Path) -> None:
    class Local(enum.StrEnum):
        A = "a"

    class Word(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "word"

    async with CheckpointEngine(root) as engine:
        await (await engine.save({Local.A: {Word("b"): torch.ones(1), "n": 1}})).upload_completion
        assert_same(await engine.read(), {"a": {"b": torch.ones(1), "n": 1}})
        target: dict[Any, Any] = {Local.A: {Word("b"): torch.zeros(1), "n": 0}}
        await engine.load(target)
        assert_same(target, {Local.A: {Word("b"): torch.ones(1), "n": 1}})


@pytest.mark.parametrize("case", TOP)
def test_ranks_tell_each_other_of_such_keys(case: str) -> None:
    key, text = TOP[case]
    state = OrderedDict([(key, {key: torch.ones(1)}), ("leaf", {key: 1})])
    local_plan = loads(dumps(make_local_plan(capture(state, None), None)))
    assert unpack_tensors(local_plan["tensors"])["names"] == [f"{text}.{text}"]
    assert unpack_tree(local_plan["tree"]) is not None


@pytest.mark.parametrize("case", TOP)
async def test_stock_reads_and_writes_the_same_names(root: Path, case: str) -> None:
    key, _ = TOP[case]
    state = {key: {"w": torch.ones(3)}}
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save(state)).upload_completion
        target = {key: {"w": torch.zeros(3)}}
        dcp.load(target, checkpoint_id=root / info.checkpoint_id, no_dist=True)
        assert_same(target, state)
        dcp.save({key: {"w": torch.full((3,), 2.0)}}, checkpoint_id=root / "stock", no_dist=True)
        await engine.load(target, "stock")
        assert target[key]["w"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("one", [Part.MODEL, np.str_("model"), Text("model")], ids=["enum", "numpy", "own"])
async def test_two_keys_of_one_name_are_refused(root: Path, one: Any) -> None:
    class Other(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            return self is other

    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"two leaves have the name 'm\.model'"):
            await engine.save({"m": {one: torch.ones(1), Other("model"): torch.ones(1)}})


@pytest.mark.parametrize("twice", ["tensor", "leaf"])
async def test_a_load_refuses_two_values_of_one_name(root: Path, twice: str) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"a": {"b": torch.ones(4)}})).upload_completion
        target, other = torch.zeros(4), torch.zeros(4) if twice == "tensor" else 0
        with pytest.raises(IncompatibleStateError, match=r"two leaves have the name 'a\.b'"):
            await engine.load({"a": {"b": target}, "a.b": other})
        assert not target.any()
