"""Nothing that a checkpoint names is run unless the user trusts it; what is harmless works by itself."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import http
import os
import pathlib
import signal
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dcp_async import CheckpointEngine, Trust, UntrustedCheckpointError
from tests.support.doubles import assert_same, random_tensor, written_unchecked


@dataclasses.dataclass
class Progress:
    epoch: int
    name: str


class Colour(enum.Enum):
    RED = 1


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slotted) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]  # mutable, like the state leaves it stands for


Point = collections.namedtuple("Point", ["x", "y"])

CUSTOM = {"dataclass": Progress(3, "x"), "enum": Colour.RED, "slotted": Slotted(4), "namedtuple": Point(1, 2)}


@pytest.mark.parametrize("name", CUSTOM)
async def test_a_custom_class_is_refused_by_name_before_anything_is_touched(root: Path, name: str) -> None:
    leaf = CUSTOM[name]
    await written_unchecked(root, {"w": torch.ones(3), "leaf": leaf})
    async with CheckpointEngine(root) as engine:
        state: dict[str, Any] = {"w": torch.zeros(3), "leaf": None}
        with pytest.raises(UntrustedCheckpointError, match=type(leaf).__name__) as caught:
            await engine.load(state)
        assert "Trust" in str(caught.value)
        assert caught.value.checkpoint_id is not None
        assert_same(state, {"w": torch.zeros(3), "leaf": None})
        with pytest.raises(UntrustedCheckpointError, match="leaf"):
            await engine.read()
        assert_same(await engine.read(keys=["w"]), {"w": torch.ones(3)})


@pytest.mark.parametrize("name", CUSTOM)
async def test_safe_globals_admit_a_class(root: Path, name: str) -> None:
    leaf = CUSTOM[name]
    async with CheckpointEngine(root, trust=Trust(safe_globals=(type(leaf),))) as engine:
        await (await engine.save({"leaf": leaf, "deep": [{"er": (leaf,)}]})).upload_completion
        assert (await engine.read()) == {"leaf": leaf, "deep": [{"er": (leaf,)}]}
        state: dict[str, Any] = {"leaf": None}
        await engine.load(state)
        assert state["leaf"] == leaf
        assert type(state["leaf"]) is type(leaf)


@pytest.mark.parametrize("name", CUSTOM)
async def test_unsafe_admits_everything(root: Path, name: str) -> None:
    async with CheckpointEngine(root, trust=Trust(unsafe=True)) as engine:
        await (await engine.save({"leaf": CUSTOM[name]})).upload_completion
        assert (await engine.read())["leaf"] == CUSTOM[name]


async def test_safe_globals_admit_nothing_else(root: Path) -> None:
    await written_unchecked(root, {"leaf": Colour.RED})
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Progress,))) as engine:
        with pytest.raises(UntrustedCheckpointError, match="Colour"):
            await engine.read()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


class Getter:
    """Asks for a harmless global and walks from there."""

    def __reduce__(self) -> Any:
        return getattr, (torch.nn.Module, "__init__")


class Evaluator:
    def __reduce__(self) -> Any:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("trusted", [(), (Progress,)])
async def test_leaves_run_nothing(root: Path, tmp_path: Path, trusted: tuple[type, ...]) -> None:
    mark = tmp_path / "exploded"
    leaves = (Bomb(mark), (1, [Bomb(mark)]), Getter(), Evaluator())
    await written_unchecked(root, *({"leaf": leaf} for leaf in leaves), first=0)
    async with CheckpointEngine(root, trust=Trust(safe_globals=trusted)) as engine:
        for step in range(len(leaves)):
            with pytest.raises(UntrustedCheckpointError):
                await engine.read(step)
            with pytest.raises(UntrustedCheckpointError):
                await engine.load({"leaf": None}, step)
    assert not mark.exists()


async def test_latest_does_not_fall_back_over_an_untrusted_checkpoint(root: Path) -> None:
    await written_unchecked(root, {"leaf": 1}, {"leaf": Progress(1, "x")})
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError):
            await engine.load({"leaf": None})


NUMPY: dict[str, Any] = {
    "array": np.arange(6.0).reshape(2, 3),
    "empty": np.zeros((0, 3)),
    "zero_dim": np.array(4),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], dtype=np.complex64),
    "text": np.array(["a", "bc"]),
    "bytes": np.array([b"a", b"bc"]),
    "datetime": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "structured": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "scalar": np.float32(0.1),
    "int_scalar": np.int64(3),
    "bool_scalar": np.bool_(True),
    "str_scalar": np.str_("x"),
    "dtype": np.dtype("float64"),
    "dtype_object": np.dtype([("a", "i4")]),
    "random_state": np.random.RandomState(3).get_state(),
}


@pytest.mark.parametrize("name", NUMPY)
async def test_numpy_values_work_by_themselves(root: Path, name: str) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"leaf": NUMPY[name], "list": [NUMPY[name]]})).upload_completion
        result = await engine.read()
    assert_same(result["leaf"], NUMPY[name])
    assert type(result["leaf"]) is type(NUMPY[name])
    assert_same(result["list"], [NUMPY[name]])


UTC = datetime.UTC
STDLIB: dict[str, Any] = {
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    "naive": datetime.datetime(2026, 1, 2),  # noqa: DTZ001 - users save what they have
    "date": datetime.date(2026, 1, 2),
    "time": datetime.time(1, 2, 3),
    "timedelta": datetime.timedelta(days=1, microseconds=3),
    "timezone": datetime.timezone(datetime.timedelta(hours=2)),
    "decimal": decimal.Decimal("1.10"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "path": pathlib.Path("a/b"),
    "pure_path": pathlib.PurePosixPath("a/b"),
    "ordered": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2], maxlen=3),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "http_status": http.HTTPStatus.NOT_FOUND,
    "signal": signal.SIGTERM,
    "complex": 1 + 2j,
    "range": range(2, 9, 3),
    "slice": slice(1, 2),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "bytearray": bytearray(b"x"),
    "namespace": types.SimpleNamespace(a=1),
}


@pytest.mark.parametrize("name", STDLIB)
async def test_value_types_of_the_standard_library_work_by_themselves(root: Path, name: str) -> None:
    value = STDLIB[name]
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"list": [1, value], "set": (value,)})).upload_completion
        result = await engine.read()
    assert result == {"list": [1, value], "set": (value,)}
    assert type(result["set"][0]) is type(value)


TORCH: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "device": torch.device("cpu", 0),
    "size": torch.Size([1, 2]),
    "tensor_in_tuple": (random_tensor(torch.float32, (3,), 1), 2),
    "parameter_in_tuple": (torch.nn.Parameter(torch.ones(2)),),
    "layout": torch.strided,
    "generator_state": (torch.Generator().get_state(),),
}


@pytest.mark.parametrize("name", TORCH)
async def test_value_types_of_torch_work_by_themselves(root: Path, name: str) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"leaf": TORCH[name]})).upload_completion
        result = (await engine.read())["leaf"]
    assert type(result) is type(TORCH[name])
    assert_same(result, TORCH[name])


async def test_a_list_of_safe_globals_is_as_good_as_a_tuple(root: Path) -> None:
    given: Any = [Progress]
    async with CheckpointEngine(root, trust=Trust(safe_globals=given)) as engine:
        await (await engine.save({"leaf": Progress(1, "x")})).upload_completion
        assert await engine.read() == {"leaf": Progress(1, "x")}


async def test_what_no_list_can_admit_is_not_offered(root: Path) -> None:
    """An object that changes a class: naming the class among safe_globals would not help."""

    class Patch:
        def __reduce__(self) -> Any:
            return Progress, (1, "x"), None, None, None

    class Scalar:
        def __reduce__(self) -> Any:
            return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)

    await written_unchecked(root, {"leaf": Patch()}, {"leaf": Scalar()})
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match=r"safe_globals=\(Progress,\)"):
            await engine.read(1)
        with pytest.raises(UntrustedCheckpointError, match=r"allow anything with Trust\(unsafe=True\)"):
            await engine.read(2)


def test_trust_is_validated() -> None:
    odd: Any = ("os.system", 3)
    with pytest.raises((TypeError, ValueError)):
        Trust(safe_globals=odd)
