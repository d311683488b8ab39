"""Recipes of nested states, and what it means that two states are the same bit for bit.

Enters: what hypothesis draws. Leaves: a State, a description without a tensor in it, which builds the same
structure as often as wanted, each time with other values (`salt`). Invariant: two builds share nothing, so no
example sees what another one did.
"""

from __future__ import annotations

import collections
import copy
import datetime
import decimal
import enum
import http
import math
import pathlib
import struct
import types
from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import assume
from torch import nn

from tests.support import doubles
from tests.support.doubles import DTYPES, random_tensor

# --- classes of a trainer's own, which leaves may be of ---------------------------------------------


class Phase(enum.Enum):
    WARM = "warm"
    HOT = "hot"


@dataclass
class Progress:
    epoch: int
    history: list[Any]
    tag: str | None = None


class Span(NamedTuple):
    low: Any
    high: Any


class Marked(torch.Tensor):
    """A subclass that torch's functions see: they give Marked tensors back."""


class Quiet(torch.Tensor):
    """A subclass that torch's functions do not see."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way


class Holder:
    """A Stateful that holds anything."""

    def __init__(self, values: dict[Any, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[Any, Any]:
        return self.values

    def load_state_dict(self, state: dict[Any, Any]) -> None:
        self.values = state


class Tied(nn.Module):
    """Two names for one parameter, a buffer, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(2, 2, dtype=torch.int16))
        self.extra: Any = 0

    def get_extra_state(self) -> Any:
        return {"extra": self.extra}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state["extra"]


TRUSTED = (Phase, Progress, Span, Marked, Quiet, UserDict)

# --- recipes ----------------------------------------------------------------------------------------

ODD_DTYPES = [
    torch.float4_e2m1fn_x2, torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2,
]  # fmt: skip
"""Those beyond the common ones that torch itself can save; it can't int1 to int7 and uint1 to uint7."""
STOCK_DTYPES = [*DTYPES, torch.float4_e2m1fn_x2]
"""Those that stock's planner can save: it makes a flat view of the bytes, which bits8 and its like lack."""

VIEWS = [
    "whole",
    "turned",
    "sliced",
    "stepped",
    "expanded",
    "conjugate",
    "negative",
    "parameter",
    "buffer",
    "grad",
]
NEGATABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.complex64, torch.complex128, torch.int32}
)
DIFFERENTIABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64})


def bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bytes as a tensor; seed 0 means zeros, so that what hypothesis shrinks becomes simple."""
    if seed == 0:
        size = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
        return torch.zeros(size, dtype=torch.uint8).view(dtype).reshape(shape)
    return random_tensor(dtype, shape, seed)


@dataclass
class Builder:
    """One build of a state. `target`: something to load into, with other leaves and no expanded tensors."""

    salt: int = 0
    target: bool = False
    pool: list[torch.Tensor] = field(default_factory=list)

    def seed(self, seed: int) -> int:
        return seed + 7919 * self.salt


@dataclass(frozen=True)
class Leaf:
    value: Any

    def build(self, builder: Builder) -> Any:
        if builder.target:
            return None
        if not builder.salt:
            return self.value
        if type(self.value) is int:
            return self.value + builder.salt
        if type(self.value) in (str, bytes):
            return self.value * 3
        return self.value


@dataclass(frozen=True)
class Plain:
    """A strided tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    seed: int = 0
    view: str = "whole"

    def build(self, builder: Builder) -> torch.Tensor:
        dtype, shape, seed = self.dtype, self.shape, builder.seed(self.seed)
        view = "whole" if dtype in ODD_DTYPES else self.view
        if view == "turned":
            return bits(dtype, shape[::-1], seed).permute(tuple(reversed(range(len(shape)))))
        if view == "sliced":
            base = bits(dtype, tuple(extent + 2 for extent in shape), seed)
            for dim, extent in enumerate(shape):
                base = base.narrow(dim, 1, extent)
            return base
        if view == "stepped":
            base = bits(dtype, (*shape[:-1], 2 * shape[-1]) if shape else (3,), seed)
            return base[..., ::2] if shape else base[1]
        if view == "expanded" and shape and not builder.target:
            return bits(dtype, (1, *shape[1:]), seed).expand(shape)
        tensor = bits(dtype, shape, seed)
        if view == "conjugate" and dtype.is_complex:
            return tensor.conj()
        if view == "negative" and dtype in NEGATABLE:
            return torch._neg_view(tensor)
        if view == "parameter":
            return nn.Parameter(tensor, requires_grad=dtype in DIFFERENTIABLE)
        if view == "buffer":
            return nn.Buffer(tensor)
        if view == "grad" and dtype in DIFFERENTIABLE:
            return tensor.requires_grad_().view(shape)
        return tensor


@dataclass(frozen=True)
class Shared:
    """A tensor of the pool, or a view of one: ties and aliases."""

    slot: int
    how: str = "same"

    def build(self, builder: Builder) -> torch.Tensor:
        tensor = builder.pool[self.slot]
        if self.how == "detached":
            return tensor.detach()
        if self.how == "part" and tensor.dim():
            return tensor.detach()[1:]
        if self.how == "turned":
            return tensor.detach().permute(tuple(reversed(range(tensor.dim()))))
        if self.how == "raw":
            return tensor.detach().view(torch.uint8) if tensor.dim() else tensor.detach()
        return tensor


@dataclass(frozen=True)
class Exotic:
    """A tensor that is more than a block of memory."""

    kind: str
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def build(self, builder: Builder) -> torch.Tensor:
        seed = builder.seed(self.seed)
        dtype = self.dtype
        if self.kind in ("marked", "quiet"):
            return bits(dtype, (3, 2), seed).as_subclass(Marked if self.kind == "marked" else Quiet)
        if self.kind.startswith("coo"):
            indices = torch.randint(0, 4, (2, seed % 6), generator=torch.Generator().manual_seed(seed))
            values = bits(dtype, (seed % 6,), seed)
            if self.kind == "coo":
                indices = torch.unique(indices, dim=1)
                return torch.sparse_coo_tensor(indices, values[: indices.shape[1]], (4, 5), is_coalesced=True)
            return torch.sparse_coo_tensor(indices, values, (4, 5))
        if self.kind in ("csr", "csc", "bsr", "bsc"):
            # torch copies only between as many elements: the pattern stays, the values change
            filled = torch.rand(4, 6, generator=torch.Generator().manual_seed(self.seed)) < 0.3
            if self.kind in ("csr", "csc"):
                pattern = getattr(filled, f"to_sparse_{self.kind}")()
            else:
                pattern = getattr(filled, f"to_sparse_{self.kind}")((2, 3))
            outer, inner = (
                (pattern.crow_indices(), pattern.col_indices())
                if self.kind in ("csr", "bsr")
                else (pattern.ccol_indices(), pattern.row_indices())
            )
            values = bits(dtype, tuple(pattern.values().shape), seed)
            make: Callable[..., torch.Tensor] = getattr(torch, f"sparse_{self.kind}_tensor")
            return make(outer, inner, values, (4, 6))
        if self.kind == "affine":
            ints = bits(torch.int8, (3, 4), seed)
            return torch._make_per_tensor_quantized_tensor(ints, 0.5 + builder.salt, 3)
        if self.kind == "channels":
            scales, zeros = torch.arange(1.0, 4.0) + builder.salt, torch.arange(3)
            return torch._make_per_channel_quantized_tensor(bits(torch.uint8, (3, 4), seed), scales, zeros, 0)
        if self.kind == "qint32":
            return torch._make_per_tensor_quantized_tensor(bits(torch.int32, (3, 4), seed), 0.5, 0)
        parts = [bits(dtype, (rows, 3), seed + rows) for rows in (2, 1, 4)]
        return torch.nested.nested_tensor(
            parts, layout=torch.jagged if self.kind == "jagged" else torch.strided
        )


@dataclass(frozen=True)
class Module:
    kind: str
    seed: int = 0

    def build(self, builder: Builder) -> nn.Module:
        made: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(3, 2),
            "norm": lambda: nn.BatchNorm1d(3),
            "tied": Tied,
            "conv": lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.PReLU()),
            "empty": nn.Identity,
            "half": lambda: nn.Linear(2, 2).to(torch.bfloat16),
        }
        module = made[self.kind]()
        seed = builder.seed(self.seed)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(bits(tensor.dtype, tuple(tensor.shape), seed))
        if isinstance(module, Tied):
            module.extra = None if builder.target else seed
        return module


@dataclass(frozen=True)
class Stateful:
    entries: tuple[tuple[Any, Recipe], ...]

    def build(self, builder: Builder) -> Holder:
        return Holder(dict(_build_entries(self.entries, builder)))


@dataclass(frozen=True)
class Node:
    """A container. A tuple is a leaf to DCP: what lies in it is pickled whole."""

    kind: str
    entries: tuple[tuple[Any, Recipe], ...] = ()

    def build(self, builder: Builder) -> Any:
        if self.kind in ("tuple", "span"):
            if builder.target:
                return None
            made = [recipe.build(builder) for _, recipe in self.entries]
            return tuple(made) if self.kind == "tuple" else Span(*[*made, None, None][:2])
        pairs = _build_entries(self.entries, builder)
        if self.kind == "list":
            return [value for _, value in pairs]
        if self.kind == "counter":
            counter: Counter[Any] = Counter()
            for key, value in pairs:
                counter[key] = value
            return counter
        if self.kind == "default":
            return defaultdict(list, pairs)
        if self.kind == "default-none":
            return defaultdict(None, pairs)
        return {"dict": dict, "ordered": OrderedDict, "user": UserDict}[self.kind](pairs)


Recipe: TypeAlias = "Leaf | Plain | Shared | Exotic | Module | Stateful | Node"


def _build_entries(entries: tuple[tuple[Any, Recipe], ...], builder: Builder) -> Iterator[tuple[Any, Any]]:
    return ((key, recipe.build(builder)) for key, recipe in entries)


@dataclass(frozen=True)
class State:
    """A whole state; `pool` are the tensors that its Shared refer to."""

    entries: tuple[tuple[str, Recipe], ...]
    pool: tuple[Plain, ...] = ()

    def build(self, salt: int = 0, *, target: bool = False) -> dict[str, Any]:
        builder = Builder(salt, target)
        builder.pool = [recipe.build(builder) for recipe in self.pool]
        return dict(_build_entries(self.entries, builder))


def told_names(state: State) -> list[str]:
    """DCP's dotted names of what is stored and of objects, which may occur twice: {"a.b": 1} and {"a": {"b":
    1}}."""

    def below(name: str, recipe: Recipe) -> Iterator[str]:
        if isinstance(recipe, (Module, Stateful)):
            yield name
        if isinstance(recipe, Module):
            builder = Builder()
            yield from (f"{name}.{key}" for key in recipe.build(builder).state_dict())
        elif isinstance(recipe, Stateful) or (
            isinstance(recipe, Node) and recipe.kind not in ("tuple", "span")
        ):
            for key, entry in recipe.entries:
                yield from below(f"{name}.{key}", entry)
        else:
            yield name

    return [found for key, recipe in state.entries for found in below(key, recipe)]


# --- what is drawn ----------------------------------------------------------------------------------


def _nan(payload: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<Q", 0x7FF0 << 48 | payload))[0]
    return value


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NUMBERS = (
    st.integers()
    | st.integers(-(1 << 300), 1 << 300)
    | st.floats()
    | st.integers(1, (1 << 52) - 1).map(_nan)
    | st.complex_numbers()
    | st.booleans()
)
ATOMS = (
    st.none() | NUMBERS | TEXT | st.binary(max_size=6) | st.sampled_from([*Phase, http.HTTPStatus.OK])
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC)) | st.timedeltas() | st.dates() | st.times()
    | st.decimals() | st.fractions() | st.uuids() | st.builds(range, st.integers(-3, 3), st.integers(-9, 9))
    | st.builds(pathlib.PurePosixPath, st.sampled_from(["a", "/b/c"]))
    | st.sampled_from([torch.Size((2, 3)), torch.float16, torch.device("cpu"), slice(1, None, 2), ...])
    | st.just(b"x" * 5000)
    | st.frozensets(st.integers() | TEXT, max_size=3) | st.sets(TEXT, max_size=3) | st.binary().map(bytearray)
    | st.builds(Progress, st.integers(), st.lists(NUMBERS, max_size=2), st.none() | TEXT)
    | st.builds(types.SimpleNamespace, a=NUMBERS)
    | st.lists(st.integers(), max_size=4).map(collections.deque)
)  # fmt: skip
ARRAY_DTYPES = [
    "?", "i1", "u2", "i8", "f2", "f4", "f8", "c8", "c16", "<U3", "S2", "M8[s]", "m8[ns]", ">i4", "i4,f8",
]  # fmt: skip


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    dtype = np.dtype(draw(st.sampled_from(ARRAY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    count = math.prod(shape) * dtype.itemsize
    raw = bytes(count) if dtype.kind in "U?" else draw(st.binary(min_size=count, max_size=count))
    array = np.frombuffer(raw, dtype).reshape(shape) if count else np.zeros(shape, dtype)
    form = draw(st.sampled_from(["array", "fortran", "scalar", "objects"]))
    if form == "fortran":
        return np.asfortranarray(array)
    if form == "scalar" and dtype.fields is None:
        return array.reshape(-1)[0] if array.size else dtype.type()
    if form == "objects":
        objects = np.empty(2, object)
        objects[:] = [draw(NUMBERS), draw(TEXT)]
        return objects
    return array


LEAVES = st.builds(Leaf, ATOMS) | st.builds(Leaf, arrays())
SEEDS = st.integers(0, 99)
SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple) | st.sampled_from(
    [(129, 257), (40_000,), (3, 5, 4096), (65_537, 2)]  # these span parts
)
WHOLE_EXOTICS = st.builds(
    Exotic, st.sampled_from(["affine", "channels", "qint32", "marked", "quiet"]), seed=SEEDS
)
STOCK_EXOTICS = st.builds(Exotic, st.sampled_from(["qint32", "marked", "quiet"]), seed=SEEDS)
SPARSE = st.builds(
    Exotic,
    st.sampled_from(["coo", "coo-twice", "csr", "csc", "bsr", "bsc"]),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.complex64]),
    SEEDS,
)
NESTED = st.builds(Exotic, st.sampled_from(["nested", "jagged"]), st.sampled_from(DTYPES[:2]), SEEDS)
MODULES = st.builds(Module, st.sampled_from(["linear", "norm", "tied", "conv", "empty", "half"]), SEEDS)

TEXT_KEYS = st.sampled_from(["a", "b", "weight", "0", "1", "a.b", "x.y.z", "sp ace"]) | TEXT
KEYS = (
    TEXT_KEYS | TEXT_KEYS | st.integers(-2, 3) | st.integers(1 << 62, 1 << 70) | st.none() | st.booleans()
    | st.floats(allow_nan=False) | st.binary(max_size=2) | st.sampled_from(Phase) | st.just(torch.float16)
    | st.tuples(st.integers(0, 3), TEXT)
)  # fmt: skip
POOL = (Plain(torch.float32, (3, 4), 1), Plain(torch.bfloat16, (5,), 2, "parameter"))


def _tensors(dtypes: list[torch.dtype], hows: list[str]) -> st.SearchStrategy[Recipe]:
    plain = st.builds(Plain, st.sampled_from(dtypes), SHAPES, SEEDS, st.sampled_from(VIEWS))
    return plain | plain | st.builds(Shared, st.integers(0, 1), st.sampled_from(hows))


def _entries(keys: st.SearchStrategy[Any], inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Any]:
    unique = (lambda pair: str(pair[0]), lambda pair: pair[0])
    return st.lists(st.tuples(keys, inner), max_size=4, unique_by=unique).map(tuple)


_KINDS = ["dict", "list", "ordered", "default", "default-none", "counter"]


def _trees(
    leaves: st.SearchStrategy[Recipe],
    pickled: st.SearchStrategy[Recipe],
    keys: st.SearchStrategy[Any],
    kinds: st.SearchStrategy[str],
) -> st.SearchStrategy[Recipe]:
    """Containers of `leaves`; `pickled` are those that may lie in a tuple."""

    def grow(inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
        return st.builds(Node, kinds, _entries(keys, inner))

    inside = st.lists(pickled | grow(pickled), max_size=3).map(lambda found: tuple(enumerate(found)))
    return st.recursive(
        leaves | st.builds(Node, st.sampled_from(["tuple", "span"]), inside), grow, max_leaves=6
    )


def _state(draw: st.DrawFn, top: st.SearchStrategy[Recipe]) -> State:
    state = State(draw(_entries(TEXT_KEYS, top)), POOL)
    names = told_names(state)
    assume(len(set(names)) == len(names))
    return state


_OUR_KINDS = st.sampled_from([*_KINDS, "user"])
_HOWS = ["same", "same", "detached", "part", "turned"]
_PICKLED = _tensors([*DTYPES, *ODD_DTYPES], _HOWS) | LEAVES | WHOLE_EXOTICS | SPARSE | NESTED
_OURS = _tensors([*DTYPES, *ODD_DTYPES], [*_HOWS, "raw"]) | LEAVES | WHOLE_EXOTICS | SPARSE | NESTED
_STATEFULS = MODULES | st.builds(Stateful, _entries(KEYS, _trees(_OURS, _PICKLED, KEYS, _OUR_KINDS)))
_TOP = _trees(_OURS | _STATEFULS, _PICKLED, KEYS, _OUR_KINDS)


@st.composite
def states(draw: st.DrawFn) -> State:
    """Everything that the engine takes."""
    return _state(draw, _TOP)


_STOCK = _trees(
    _tensors(STOCK_DTYPES, [*_HOWS, "raw"]) | LEAVES | STOCK_EXOTICS,
    _PICKLED,
    TEXT_KEYS,
    st.sampled_from(_KINDS),
)
_STOCK_TOP = _STOCK | MODULES | st.builds(Stateful, _entries(TEXT_KEYS, _STOCK))


def _vanishes(recipe: Recipe) -> bool:
    """Whether nothing of it has a name: it is an empty mapping, or holds nothing else."""
    if isinstance(recipe, Module):
        return recipe.kind == "empty"
    if isinstance(recipe, Node) and recipe.kind == "list":
        return bool(recipe.entries) and all(_vanishes(entry) for _, entry in recipe.entries)
    if isinstance(recipe, Stateful) or (isinstance(recipe, Node) and recipe.kind not in ("tuple", "span")):
        return all(_vanishes(entry) for _, entry in recipe.entries)
    return False


def _has_hole(recipe: Recipe) -> bool:
    """Whether a list in it has an entry that vanishes."""
    if isinstance(recipe, (Node, Stateful)):
        is_list = isinstance(recipe, Node) and recipe.kind == "list"
        return any((is_list and _vanishes(entry)) or _has_hole(entry) for _, entry in recipe.entries)
    return False


@st.composite
def stock_states(draw: st.DrawFn, *, for_its_load: bool = False) -> State:
    """What stock's save and load take as well: Statefuls at the top only; str keys, since stock's load puts a
    leaf that it finds below the key 3 beside it, at "3"; no sparse and no nested tensors outside of a tuple,
    since its planner asks each tensor for a storage and a shape; no quantized ones of another scale, since
    its load copies the integers and leaves the target's scale.

    Args: ``for_its_load`` leaves out lists with an empty mapping in them: stock rebuilds the target without
    empty mappings, and then looks for the list as one leaf.
    """
    state = _state(draw, _STOCK_TOP)
    assume(not for_its_load or not any(_has_hole(recipe) for _, recipe in state.entries))
    return state


# --- sameness ---------------------------------------------------------------------------------------

PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


def pictured(value: Any) -> Any:
    """`value` with each Stateful replaced by its state_dict(): what a checkpoint holds of it."""
    if hasattr(type(value), "load_state_dict") and not isinstance(value, type):
        return pictured(value.state_dict())
    if isinstance(value, list):
        return [pictured(entry) for entry in value]
    if isinstance(value, UserDict):
        return UserDict({key: pictured(entry) for key, entry in value.items()})
    if isinstance(value, dict):
        made = copy.copy(value)  # of the same kind, and in the same order
        for key, entry in value.items():
            made[key] = pictured(entry)
        return made
    return value


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """As in doubles, also of a single element that has a stride."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return doubles.raw_bytes(plain.clone(memory_format=torch.contiguous_format))


def _tensor_parts(tensor: torch.Tensor) -> list[Any]:
    """Everything that two tensors must agree on: what kind they are of, and bytes."""
    kind = torch.Tensor if type(tensor) in PLAIN_TYPES else type(tensor)
    head: list[Any] = [kind, tensor.dtype, tensor.layout, tensor.is_nested]
    tensor = tensor.detach()
    if kind in (Marked, Quiet):
        tensor = tensor.as_subclass(torch.Tensor)
    if tensor.is_nested:
        return [*head, *((tuple(part.shape), raw_bytes(part)) for part in tensor.unbind())]
    head.append(tuple(tensor.shape))
    if tensor.is_quantized:
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        scale: Any = (
            [raw_bytes(tensor.q_per_channel_scales()), raw_bytes(tensor.q_per_channel_zero_points())]
            if per_channel
            else [tensor.q_scale(), tensor.q_zero_point()]
        )
        return [*head, tensor.qscheme(), scale, raw_bytes(tensor.int_repr())]
    if tensor.layout is torch.sparse_coo:
        return [*head, tensor.is_coalesced(), raw_bytes(tensor._indices()), raw_bytes(tensor._values())]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [*head, *map(raw_bytes, (tensor.crow_indices(), tensor.col_indices(), tensor.values()))]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [*head, *map(raw_bytes, (tensor.ccol_indices(), tensor.row_indices(), tensor.values()))]
    return [*head, raw_bytes(tensor)]


def difference(left: Any, right: Any, path: str = "state") -> str | None:
    """The first place where `right` is not what `left` is, or None. A Mapping of no known class counts as a
    dict."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        pairs = zip(_tensor_parts(left), _tensor_parts(right), strict=False)
        found = next((pair for pair in pairs if pair[0] != pair[1]), None)
        return None if found is None else f"{path}: {found[0]!r:.200} became {found[1]!r:.200}"
    kind = dict if type(left) is UserDict and type(right) is dict else type(left)
    if kind is not type(right):
        return f"{path}: a {type(left).__name__} became a {type(right).__name__}"
    if isinstance(left, Mapping):
        keys = [[(type(key), key) for key in mapping] for mapping in (left, right)]
        if keys[0] != keys[1]:
            return f"{path}: keys {list(left)!r} became {list(right)!r}"
        factories = [getattr(mapping, "default_factory", None) for mapping in (left, right)]
        if factories[0] != factories[1]:
            return f"{path}: default_factory {factories[0]} became {factories[1]}"
        return _first(difference(left[key], right[key], f"{path}[{key!r}]") for key in left)
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{path}: {len(left)} entries became {len(right)}"
        return _first(
            difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True))
        )
    same = _leaf_key(left) == _leaf_key(right)
    return None if same else f"{path}: {left!r} became {right!r}"


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def _leaf_key(value: Any) -> Any:
    """Equal for leaves that are equal to the bit: NaNs count by their payload, zeros by their sign."""
    if isinstance(value, np.ndarray):
        if not value.dtype.isnative:  # numpy's own pickles give such arrays back in the machine's order
            value = value.astype(value.dtype.newbyteorder("="))
        order = (value.flags.c_contiguous, value.flags.f_contiguous)
        content = [_leaf_key(item) for item in value.flat] if value.dtype.hasobject else value.tobytes()
        return value.dtype, value.shape, order, content
    if isinstance(value, np.generic):
        return type(value), value.dtype, value.tobytes()
    if isinstance(value, float):
        return type(value), struct.pack("d", value)
    if isinstance(value, complex):
        return type(value), struct.pack("dd", value.real, value.imag)
    if isinstance(value, decimal.Decimal):
        return type(value), value.as_tuple()
    if isinstance(value, range):
        return type(value), value.start, value.stop, value.step
    if isinstance(value, Progress):
        return value.epoch, [_leaf_key(item) for item in value.history], value.tag
    if isinstance(value, types.SimpleNamespace):
        return [(key, _leaf_key(item)) for key, item in vars(value).items()]
    return type(value), value


def pairs_of(left: Any, right: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of two states of one structure side by side, but for those in leaves that are pickled
    whole."""
    if isinstance(left, torch.Tensor):
        yield left, right
    elif isinstance(left, (Mapping, UserDict)):
        for key in left:
            yield from pairs_of(left[key], right[key])
    elif isinstance(left, list):
        for a, b in zip(left, right, strict=True):
            yield from pairs_of(a, b)


def is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
    )


def tie_difference(saved: Any, found: Any) -> str | None:
    """Says which tensors of `found` are not tied as those of `saved` are: same view, same memory."""
    groups: dict[Any, set[int]] = {}
    owners: dict[int, set[Any]] = {}
    for left, right in pairs_of(saved, found):
        if is_plain(left) and left.numel():
            lazy = (left.is_conj(), left.is_neg())
            view = (left.data_ptr(), left.dtype, tuple(left.shape), left.stride(), lazy)
            groups.setdefault(view, set()).add(right.data_ptr())
            owners.setdefault(right.data_ptr(), set()).add(view)
    for view, places in groups.items():
        if len(places) > 1:
            return f"tied tensors of {view[1]} {view[2]} came back as {len(places)}"
    for views in owners.values():
        if len(views) > 1:
            return f"tensors that were not tied came back as one: {[view[1:] for view in views]}"
    return None


def assert_same(left: Any, right: Any) -> None:
    text = difference(left, right)
    assert text is None, text
