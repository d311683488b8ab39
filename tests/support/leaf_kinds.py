"""Every kind of leaf and container that a trainer may hold, and a page that says what becomes of each.

Nothing on the page is written by hand but the introduction and the names: each cell is found out by
saving one state of that kind, looking into its files, and loading it in every way there is. To write it
anew:

    python -m tests.support.leaf_kinds > docs/reference/leaf-kinds.md
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import http
import logging
import pathlib
import random
import re
import sys
import tempfile
import types
import uuid
import warnings
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_async import AppState, LoadError, RNGState, SaveError, StagingOptions, Trust, sync
from dcp_async.errors import UntrustedCheckpointError
from tests.property.states import Marked, Quiet, difference, pairs_of, pictured
from tests.support.doubles import KIB, PATIENCE, manifest_of, random_tensor

INTRODUCTION = """\
# Kinds of leaves

What may be in a state, how it is stored, and what comes back. `tests/support/leaf_kinds.py` writes this
page: it saves one state of each kind, looks into the files and loads them again. A test compares the page
with what it finds.

- **Stored as.** A *raw payload* is a tensor's bytes as they are: copied once, written, and read straight
  into the target. A *torch.save item* is a tensor that is more than a block of bytes, a *pickled leaf* any
  other object; both are pickled inside `save()`, so keep them small. What is *structure* only is a line of
  the manifest. *Refused* means that `save()` raises a `SaveError` that names the leaf, and nothing is
  written.
- **Stock loads it.** Whether `torch.distributed.checkpoint.load` fills a state of the same structure with
  the same values, bit for bit. After a *no* stands what stock raised, or *differs* if it raised nothing.
- **`read` gives back.** *The same* is equal to the bit and of the same type, but for a `Parameter` or
  `Buffer`, which comes back as the tensor that it is. An object with a `state_dict()` is saved as what that
  returns, and comes back as that; `load` hands it to `load_state_dict()`.
- **Trust.** What [`Trust`](api.md) must name before the leaf is unpickled; *none* if the default will do.
  An engine whose trust does not name it refuses the leaf when it is saved, by name.
"""


class Stage(enum.Enum):
    WARM = 1
    HOT = 2


@dataclass
class Progress:
    epoch: int


class Bounds(NamedTuple):
    low: int
    high: int


class Plain:
    """An object of a class of one's own, without a `state_dict`."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]  # it can change


class Loader:
    """An object with a `state_dict`."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.order = torch.arange(3) + position

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.order = state["position"], state["order"]


class AsyncLoader(Loader):
    async def state_dict(self) -> dict[str, Any]:  # type: ignore[override]  # the mistake that is shown
        await asyncio.sleep(0)
        return {}


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(3))


def any_function() -> None:
    """Stands for a function of a module."""


def _bits(*dtypes: torch.dtype) -> Callable[[int], Any]:
    return lambda seed: {
        str(dtype).removeprefix("torch."): random_tensor(dtype, (4, 4), seed) for dtype in dtypes
    }


def _optimizer(seed: int, steps: int = 1) -> torch.optim.Optimizer:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    for _ in range(steps):
        model(torch.randn(1, 2)).sum().backward()
        optimizer.step()
    return optimizer


def _averaged(seed: int) -> nn.Module:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    averaged.update_parameters(nn.Linear(2, 2))
    return averaged


def _app(seed: int) -> AppState:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 + seed)
    model(torch.randn(1, 2)).sum().backward()
    optimizer.step()
    return AppState(model, optimizer)


def _default_of_own(seed: int) -> Any:
    return collections.defaultdict(lambda: 0, a=seed)


def _objects(*values: Any) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _csr(kind: str) -> Callable[[int], torch.Tensor]:
    def make(seed: int) -> torch.Tensor:
        dense = torch.eye(4) * (seed + 2)
        sizes = ((2, 2),) if kind in ("bsr", "bsc") else ()
        made: torch.Tensor = getattr(dense, f"to_sparse_{kind}")(*sizes)
        return made

    return make


def _nested(layout: torch.layout) -> Callable[[int], torch.Tensor]:
    return lambda seed: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)


def _tied(seed: int) -> Any:
    tensor = torch.randn(3, 4)
    return {"embed": tensor, "head": tensor}


def _aliases(seed: int) -> Any:
    tensor = torch.randn(6)
    return {"head": tensor[:4], "tail": tensor[2:]}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Kind:
    name: str
    make: Callable[[int], Any]
    """One of this kind; another seed gives one of the same structure that holds something else."""
    trust: tuple[Any, ...] = ()
    """What `safe_globals` may have to name."""
    key: Callable[[Any], Any] = _same
    """What of it can be compared."""


@contextlib.contextmanager
def _source_file() -> Iterator[Any]:
    with open(__file__, "rb") as file:
        yield file


def _utc(seed: int) -> datetime.datetime:
    return datetime.datetime(2026, 1, 2 + seed, tzinfo=datetime.UTC)


def _kind(name: str, make: Callable[[int], Any], *trust: Any, key: Callable[[Any], Any] = _same) -> Kind:
    return Kind(name=name, make=make, trust=trust, key=key)


_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not list it
_RE_COMPILE: Any = re._compile  # type: ignore[attr-defined]  # private, but what a pattern's pickle names


GROUPS: dict[str, list[Kind]] = {
    "Tensors": [
        _kind("module: its parameters", lambda seed: nn.Linear(2, 3)),
        _kind("module: its buffers", lambda seed: Buffered()),
        _kind("`nn.Parameter`", lambda seed: nn.Parameter(torch.randn(3))),
        _kind("0-dim tensor", lambda seed: torch.randn(())),
        _kind("tensor without elements", lambda seed: {"flat": torch.empty(0), "deep": torch.empty(3, 0, 5)}),
        _kind("transposed or otherwise permuted", lambda seed: torch.randn(3, 4).t()),
        _kind("slice of a larger tensor", lambda seed: torch.randn(6, 6)[1:4, ::2]),
        _kind(
            "expanded tensor (save only: a target must not be one)",
            lambda seed: torch.randn(3, 1).expand(3, 4),
        ),
        _kind("tied: one tensor under two names", _tied),
        _kind("overlapping views of one tensor", _aliases),
        _kind("lazily conjugated or negated", lambda seed: torch.randn(3, dtype=torch.complex64).conj()),
        _kind("result of a computation (requires grad)", lambda seed: nn.Parameter(torch.randn(3)) * 2),
    ],
    "dtypes": [
        _kind(
            "float64, float32, float16, bfloat16",
            _bits(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        ),
        _kind(
            "int8 to int64, uint8, bool",
            _bits(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
        ),
        _kind("uint16, uint32, uint64", _bits(torch.uint16, torch.uint32, torch.uint64)),
        _kind(
            "float8: e4m3fn, e4m3fnuz, e5m2, e5m2fnuz, e8m0fnu",
            _bits(
                torch.float8_e4m3fn,
                torch.float8_e4m3fnuz,
                torch.float8_e5m2,
                torch.float8_e5m2fnuz,
                torch.float8_e8m0fnu,
            ),
        ),
        _kind("float4_e2m1fn_x2", _bits(torch.float4_e2m1fn_x2)),
        _kind("complex64, complex128", _bits(torch.complex64, torch.complex128)),
        _kind("complex32", _bits(torch.complex32)),
        _kind(
            "bits8, bits16, bits1x8, bits2x4, bits4x2",
            _bits(torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2),
        ),
        _kind("int1 to int7, uint1 to uint7 (torch can't save them)", _bits(_INT4)),
    ],
    "Tensors that are more than a block of bytes": [
        _kind("sparse COO", lambda seed: (torch.eye(4) * (seed + 2)).to_sparse()),
        _kind("sparse CSR", _csr("csr")),
        _kind("sparse CSC", _csr("csc")),
        _kind("sparse BSR", _csr("bsr")),
        _kind("sparse BSC", _csr("bsc")),
        _kind(
            "quantized per tensor",
            lambda seed: torch._make_per_tensor_quantized_tensor(
                random_tensor(torch.int8, (3, 3), seed), seed + 0.5, 3
            ),
        ),
        _kind(
            "quantized per channel",
            lambda seed: torch._make_per_channel_quantized_tensor(
                random_tensor(torch.int8, (3, 3), seed),
                torch.rand(3) + 0.1,
                torch.zeros(3, dtype=torch.long),
                0,
            ),
        ),
        _kind("nested, strided layout", _nested(torch.strided)),
        _kind("nested, jagged layout", _nested(torch.jagged)),
        _kind("subclass with `__torch_function__`", lambda seed: torch.randn(3).as_subclass(Marked), Marked),
        _kind(
            "subclass with `__torch_function__` disabled",
            lambda seed: torch.randn(3).as_subclass(Quiet),
            Quiet,
        ),
        _kind("on the meta device", lambda seed: torch.empty(3, device="meta")),
    ],
    "Python values": [
        _kind("`int`, of any size", lambda seed: (1 << 200) + seed),
        _kind(
            "`float`, NaN and infinities too",
            lambda seed: {"nan": float("nan"), "inf": float("-inf"), "f": 0.1 + seed},
        ),
        _kind("`complex`", lambda seed: complex(seed, -0.0)),
        _kind("`bool`", lambda seed: seed == 0),
        _kind("`None`", lambda seed: {"none": None, "other": seed}),
        _kind("`str`", lambda seed: f"text {seed}"),
        _kind("`str` of a mebibyte", lambda seed: str(seed) * (1 << 20)),
        _kind(
            "`bytes`, `bytearray`",
            lambda seed: {"b": b"raw" * (seed + 1), "a": bytearray(b"raw" * (seed + 1))},
        ),
        _kind("`range`, `slice`", lambda seed: {"r": range(seed, 9, 2), "s": slice(seed, None, 2)}),
        _kind("`set`, `frozenset`", lambda seed: {"s": {seed, "a"}, "f": frozenset({seed})}),
        _kind("`collections.deque`", lambda seed: collections.deque([seed, 2], maxlen=4)),
        _kind(
            "`datetime`, `timedelta`, `timezone`",
            lambda seed: {"d": _utc(seed), "t": datetime.timedelta(seed)},
        ),
        _kind("`zoneinfo.ZoneInfo`", lambda seed: zoneinfo.ZoneInfo(["UTC", "Etc/GMT"][seed])),
        _kind(
            "`Decimal`, `Fraction`",
            lambda seed: {"d": decimal.Decimal("0.10") + seed, "f": fractions.Fraction(seed, 3)},
        ),
        _kind("`pathlib.Path`", lambda seed: pathlib.Path(f"runs/{seed}")),
        _kind("`uuid.UUID`", lambda seed: uuid.UUID(int=seed)),
        _kind("`types.SimpleNamespace`", lambda seed: types.SimpleNamespace(a=seed)),
        _kind("enum of the standard library", lambda seed: [http.HTTPStatus.OK, http.HTTPStatus.FOUND][seed]),
        _kind("enum of yours", lambda seed: [Stage.WARM, Stage.HOT][seed], Stage),
        _kind("dataclass of yours", lambda seed: Progress(seed), Progress),
        _kind("named tuple of yours", lambda seed: Bounds(seed, 2), Bounds),
        _kind("any other object of a class of yours", Plain, Plain),
        _kind("`re.Pattern`", lambda seed: re.compile(f"a{seed}"), _RE_COMPILE),
        _kind("function of a module", lambda seed: [any_function, _default_of_own][seed], any_function),
        _kind("`lambda`", lambda seed: lambda: seed),
        _kind("open file", lambda seed: _source_file().__enter__()),
        _kind("generator, running", lambda seed: (entry for entry in range(seed))),
    ],
    "Containers": [
        _kind("`dict`, nested", lambda seed: {"a": {"b": {"c": torch.randn(2), "d": seed}}}),
        _kind("`dict` with int keys", lambda seed: {0: torch.randn(2), 1: torch.randn(2)}),
        _kind("`dict` with int keys and a leaf below", lambda seed: {0: torch.randn(2), 1: seed}),
        _kind(
            "`dict` with tuple, bytes or dtype keys",
            lambda seed: {(0, "a"): torch.randn(2), torch.int8: torch.randn(1)},
        ),
        _kind("`dict` with keys of an enum of yours", lambda seed: {Stage.WARM: torch.randn(2)}, Stage),
        _kind("`OrderedDict`", lambda seed: collections.OrderedDict(a=torch.randn(2), b=seed)),
        _kind("`defaultdict(int)`, `list` and its like", lambda seed: collections.defaultdict(int, a=seed)),
        _kind("`defaultdict` with a function of yours", _default_of_own, key=dict),
        _kind("`Counter`", lambda seed: collections.Counter(a=seed + 1)),
        _kind("`UserDict`", lambda seed: collections.UserDict(a=seed, b=torch.randn(2))),
        _kind("`list` of leaves", lambda seed: [seed, "a", None]),
        _kind(
            "`list` with tensors or mappings in it",
            lambda seed: [torch.randn(2), {"a": seed}, [torch.randn(1)]],
        ),
        _kind("`tuple` of leaves", lambda seed: (seed, "a")),
        _kind("`tuple` with tensors in it", lambda seed: (torch.randn(2), seed)),
        _kind("empty `dict`, `OrderedDict`", lambda seed: {"a": {}, "b": collections.OrderedDict()}),
        _kind("empty `list`, `tuple`", lambda seed: {"a": [], "b": ()}),
    ],
    "NumPy and small things of torch": [
        _kind(
            "`numpy.ndarray` of numbers, text, times",
            lambda seed: {
                "f": np.arange(3.0) + seed,
                "u": np.array(["x", "yy"]),
                "t": np.array(["2026-01-02"], "M8[s]"),
            },
        ),
        _kind("`numpy.ndarray` of the other byte order", lambda seed: np.array([1, 2 + seed], ">i4")),
        _kind("`numpy.ndarray` of records", lambda seed: np.array([(1, 2.5 + seed)], "i4,f8")),
        _kind("`numpy.ndarray` of objects", lambda seed: _objects(1 + seed, "a")),
        _kind("numpy scalar", lambda seed: np.float32(0.1 + seed)),
        _kind(
            "`numpy.random.Generator`: its state",
            lambda seed: np.random.default_rng(seed).bit_generator.state,
        ),
        _kind(
            "`torch.Generator`: `get_state()`", lambda seed: torch.Generator().manual_seed(seed).get_state()
        ),
        _kind(
            "`torch.Size`, `torch.dtype`, `torch.device`",
            lambda seed: {
                "s": torch.Size((seed, 2)),
                "t": [torch.int8, torch.float8_e5m2][seed],
                "d": torch.device("cpu"),
            },
        ),
    ],
    "Objects with a `state_dict()`": [
        _kind("your own (`Stateful`)", Loader),
        _kind("with an `async def state_dict`", AsyncLoader),
        _kind("`dcp_async.AppState`", _app),
        _kind("`dcp_async.RNGState`", lambda seed: RNGState()),
        _kind("optimizer", _optimizer),
        _kind("optimizer that took no step", lambda seed: _optimizer(seed, 0)),
        _kind(
            "learning-rate scheduler",
            lambda seed: torch.optim.lr_scheduler.StepLR(_optimizer(seed), 3 + seed),
        ),
        _kind("`torch.amp.GradScaler`", lambda seed: torch.amp.GradScaler("cpu", init_scale=2.0**seed)),
        _kind("`swa_utils.AveragedModel`", _averaged),
    ],
}


@dataclasses.dataclass(frozen=True)
class Row:
    kind: str
    stored: str
    stock: str
    read: str
    trust: str

    def __str__(self) -> str:
        return f"| {self.kind} | {self.stored} | {self.stock} | {self.read} | {self.trust} |"


def _made(kind: Kind, seed: int) -> Any:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # the one that RNGState saves
    return kind.make(seed)


def _stored_as(directory: Path, metadata: Metadata) -> str:
    """What the files of {"x": value} tell about it."""
    exotic = set(manifest_of(directory)["exotic"])
    counts: collections.Counter[str] = collections.Counter()
    places: set[Any] = set()
    for index, place in metadata.storage_data.items():
        where = (place.relative_path, place.offset)
        if where in places:
            counts["the same once more"] += 1
            continue
        places.add(where)
        entry = metadata.state_dict_metadata[index.fqn]
        if not isinstance(entry, TensorStorageMetadata):
            counts["pickled leaf"] += 1
        else:
            counts["torch.save item" if index.fqn in exotic else "raw payload"] += 1
    if not counts:
        return "structure"
    return ", ".join(f"{what} ({count})" if count > 1 else what for what, count in counts.items())


def _stock_outcome(kind: Kind, picture: Any, directory: Path) -> str:
    target = {"x": _made(kind, 1)}
    if _is_strided(target["x"]) and 0 in target["x"].stride():
        target["x"] = target["x"].clone()  # stock, like us, can't fill elements that share one place
    try:
        with torch.serialization.safe_globals(list(kind.trust)):
            dcp.load(target, checkpoint_id=directory, no_dist=True)
    except dcp.api.CheckpointException as error:
        (cause, _), *_ = error.failures.values()
        return f"no: {type(cause).__name__}"
    except Exception as error:  # whatever stock raises is what the page says
        return f"no: {type(error).__name__}"
    found = pictured(target["x"])
    return "yes" if _differs(kind, picture, found) is None else "no: differs"


def _is_strided(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_nested


def _differs(kind: Kind, left: Any, right: Any) -> str | None:
    try:
        return difference(kind.key(left), kind.key(right))
    except Exception as error:  # another structure
        return f"{type(error).__name__}: {error}"


def _read(root: Path, trust: Trust) -> Any:
    with sync.CheckpointEngine(root, trust=trust) as engine:
        return engine.read()["x"]


def _read_with_least_trust(kind: Kind, root: Path) -> tuple[Any, str]:
    """What `read` gives, and the trust that it takes."""
    names = ", ".join(getattr(item, "__name__", str(item)) for item in kind.trust)
    ways = [(Trust(), "none"), (Trust(unsafe=True), "`unsafe=True`")]
    if kind.trust:
        ways.insert(1, (Trust(safe_globals=kind.trust), f"`safe_globals=({names},)`"))
    for trust, name in ways:
        with contextlib.suppress(UntrustedCheckpointError):
            return _read(root, trust), name
    raise AssertionError(f"{kind.name}: unsafe trust was not enough")


def _read_outcome(kind: Kind, value: Any, picture: Any, found: Any) -> str:
    if _differs(kind, picture, found) is not None:
        same_type = type(found) is type(picture)
        return "something else" if same_type else f"`{type(found).__name__}`"
    if isinstance(picture, Mapping) and type(found) is not type(picture):
        return f"`{type(found).__name__}`"
    if hasattr(type(value), "load_state_dict"):
        return "its `state_dict()`"
    places = [
        right.data_ptr() for left, right in pairs_of(picture, found) if _is_strided(left) and left.numel()
    ]
    return "the same, tied" if len(set(places)) < len(places) else "the same"


def established(kind: Kind) -> Row:
    """Save one, look, load it in every way."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(name)
        value = _made(kind, 0)
        try:
            staging = StagingOptions(part_bytes=64 * KIB)
            # which kinds need trust is found out when they are read
            with sync.CheckpointEngine(root, staging=staging, trust=Trust(unsafe=True)) as engine:
                response = engine.save({"x": value})
                picture = pictured(value)
                info = response.upload_completion.result(PATIENCE)
        except SaveError:
            if hasattr(value, "close"):
                value.close()
            return Row(kind.name, "refused", "", "", "")
        directory = root / info.checkpoint_id
        metadata = dcp.FileSystemReader(directory).read_metadata()
        stored = _stored_as(directory, metadata)
        stock = _stock_outcome(kind, picture, directory)
        try:
            found, trust = _read_with_least_trust(kind, root)
        except LoadError as error:
            return Row(kind.name, stored, stock, f"`{type(error).__name__}`", "")
        return Row(kind.name, stored, stock, _read_outcome(kind, value, picture, found), trust)


def tables() -> dict[str, list[Row]]:
    """What is found out about every kind."""
    return {title: [established(kind) for kind in kinds] for title, kinds in GROUPS.items()}


def page(found: Mapping[str, list[Row]]) -> str:
    """The whole page, as it is committed."""
    lines = [INTRODUCTION]
    for title, rows in found.items():
        lines += [f"## {title}", "", "| kind | stored as | stock loads it | `read` gives back | Trust |"]
        lines += ["| --- | --- | --- | --- | --- |", *map(str, rows), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # refusals are logged as well
    sys.stdout.write(page(tables()))
