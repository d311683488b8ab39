"""What runs in each process of a world that saves tensors which all ranks hold: alike, or not."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dcp_async import CheckpointEngine, Coordination, PerRank, RNGState, StagingOptions, Timeouts, Trust
from dcp_async.errors import CheckpointError
from tests.distributed.engine_agent import EngineAgent, Logged, Outcome, described

State = dict[str, Any]


def _expert(rank: int, size: int, odd: float) -> State:
    return {"model": {"experts": {"0": {"weight": torch.full((8, 4), odd)}, "shared": torch.ones(3)}}}


def _batch_norm(rank: int, size: int, odd: float) -> State:
    module = torch.nn.BatchNorm1d(4)
    with torch.no_grad():
        module.running_mean.add_(odd)  # type: ignore[union-attr]  # it tracks them
    return {"model": module}


def _optimizer(rank: int, size: int, odd: float) -> State:
    parameter = torch.nn.Parameter(torch.ones(6))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.full((6,), 1.0 + odd)
    optimizer.step()
    return {"optim": optimizer}


def _late_element(rank: int, size: int, odd: float) -> State:
    tensor = torch.zeros(300_000)
    tensor[-1] = odd
    return {"model": {"head": torch.ones(5), "large": tensor}}


def _nan(rank: int, size: int, odd: float) -> State:
    bits = torch.tensor([0x7FC00000, 0x7FC00001 if odd else 0x7FC00000], dtype=torch.int32)
    return {"model": {"odd": bits.view(torch.float32)}}


def _replicated(rank: int, size: int, odd: float) -> State:
    mesh = init_device_mesh("cpu", (size,))
    local = torch.arange(6.0) + odd
    return {"model": {"gate": DTensor.from_local(local, mesh, [Replicate()], run_check=False)}}


def _uneven(rank: int, size: int, odd: float) -> State:
    """Rows that do not divide, over two shards, each of which two ranks hold."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    tensor = distribute_tensor(torch.arange(15.0).reshape(5, 3), mesh, [Replicate(), Shard(0)])
    with torch.no_grad():
        tensor._local_tensor.add_(odd)
    return {"model": {"rows": tensor}}


def _tied(rank: int, size: int, odd: float) -> State:
    """Tied on all ranks but on those where the second is another."""
    tensor = torch.arange(6.0)
    return {"model": {"embedding": tensor, "head": tensor + odd if odd else tensor}}


def _strided(rank: int, size: int, odd: float) -> State:
    """Equal elements in another order of memory."""
    tensor = torch.arange(12.0).reshape(3, 4)
    tensor = tensor.t().contiguous().t() if rank else tensor
    return {"model": {"w": tensor + odd}}


def _conjugate(rank: int, size: int, odd: float) -> State:
    tensor = torch.complex(torch.arange(4.0), torch.arange(4.0) - 1)
    return {"model": {"c": (tensor.resolve_conj() if rank else tensor.conj().resolve_conj().conj()) + odd}}


def _sparse(rank: int, size: int, odd: float) -> State:
    return {
        "model": {"s": torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([1.0, 2 + odd]), (4,))}
    }


def _several_dtypes(rank: int, size: int, odd: float) -> State:
    return {
        "model": {
            "half": torch.full((3,), 1.0, dtype=torch.bfloat16),
            "flag": torch.tensor([True, True, not odd]),
            "fp8": torch.full((3,), 1.0, dtype=torch.float8_e4m3fn),
            "wide": torch.full((3,), 1.0, dtype=torch.complex128),
        }
    }


KINDS: dict[str, tuple[Callable[[int, int, float], State], str]] = {
    "a scalar": (lambda rank, size, odd: {"temperature": torch.tensor(1.0 + odd)}, "temperature"),
    "an expert": (_expert, "model.experts.0.weight"),
    "a buffer of batch norm": (_batch_norm, "model.running_mean"),
    "a moment of an optimizer": (_optimizer, "optim.state.0.exp_avg"),
    "the last element of a large one": (_late_element, "model.large"),
    "the payload of a NaN": (_nan, "model.odd"),
    "a DTensor, replicated": (_replicated, "model.gate"),
    "a tie": (_tied, "model.head"),
    "other strides": (_strided, "model.w"),
    "a conjugate view": (_conjugate, "model.c"),
    "a sparse one": (_sparse, "model.s"),
    "one of several dtypes": (_several_dtypes, "model.flag"),
    "an uneven shard": (_uneven, "model.rows"),
}
"""Name -> (state of a rank; what differs from 0 there is ``odd``), what is named."""


def stages(rank: int, size: int, per_stage: int, odd: float, *, large: bool = False) -> State:
    """One name on as many meshes as there are stages."""
    meshes = [DeviceMesh("cpu", list(range(first, first + per_stage))) for first in range(0, size, per_stage)]
    mine = meshes[rank // per_stage]
    shape = (4 * per_stage, 30_000 if large else 3)
    whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + odd
    return {"model": {"layers.0.weight": distribute_tensor(whole, mine, [Shard(0)], src_data_rank=None)}}


class Once:
    """A Stateful that saves one rank's random numbers for all."""

    def state_dict(self) -> dict[str, Any]:
        (own,) = RNGState().state_dict().values()
        state: dict[str, Any] = own
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        RNGState().load_state_dict(state)


class Chatty:
    """A Stateful whose verbs each gather a word from all ranks, and fail if the others are at another."""

    def __init__(self, name: str, asked: list[str], inner: State | None = None, alone: bool = False) -> None:
        self._name, self._asked, self._inner, self._alone = name, asked, inner or {}, alone
        self.value = 0

    def _gather(self, verb: str) -> None:
        self._asked.append(f"{verb} {self._name}")
        if self._alone:
            return
        words: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(words, f"{verb} {self._name}")
        if len(set(words)) > 1:
            raise RuntimeError(f"the ranks are at {words}")

    def state_dict(self) -> State:
        self._gather("ask")
        return {"value": self.value, "w": torch.ones(2), **self._inner}

    def load_state_dict(self, state: State) -> None:
        self._gather("load")
        self.value = state["value"]


class Caching(Chatty):
    """Holds, on some ranks only, a tensor of the shape of what it gives."""

    def __init__(self, name: str, asked: list[str], inner: State | None = None, holds: bool = False) -> None:
        super().__init__(name, asked, inner)
        if holds:
            self.cache = torch.zeros(2)


def caching_states(rank: int, asked: list[str]) -> dict[str, State]:
    """Name of a layout -> a state of which each rank would ask another part."""

    def made(name: str, holder: int, inner: State | None = None) -> Caching:
        return Caching(name, asked, inner, holds=rank == holder)

    return {
        "first": {"a": made("a", 0)},
        "second": {"a": made("a", 1)},
        "each another": {"a": made("a", 1), "b": made("b", 0), "c": made("c", 2)},
        "in a list": {"z": [made("z0", 1), {"k": made("z1", 0)}]},
        "inside": {
            "outer": made(
                "outer", 0, {"in1": made("in1", 1, {"in2": made("in2", 0)}), "in3": made("in3", 2)}
            ),
            "next": made("next", 1),
        },
        "beside a module": {"m": torch.nn.Linear(1, 1), "a": made("a", 0), "z": Chatty("z", asked)},
    }


def chatty_states(rank: int, asked: list[str]) -> dict[str, State]:
    """Name of a layout -> a state that each rank has put together in another order."""

    def turned(state: State) -> State:
        return dict(reversed(state.items())) if rank % 2 else state

    def made(name: str, inner: State | None = None) -> Chatty:
        return Chatty(name, asked, inner)

    def some(*names: str) -> State:
        return turned({name: made(name) for name in names})

    return {
        "at the top": some("b", "a", "c"),
        "in a dict": {"parts": turned({"x": some("b", "a"), "a.b": made("a.b"), "10": made("10")}), "n": 1},
        "in a list": turned({"z": [made("z0"), {"k": made("z1")}], "y": [some("q", "p")]}),
        "in what a Stateful gives": turned(
            {"outer": made("outer", some("inner2", "inner1")), "after": made("after"), "w": torch.ones(1)}
        ),
        "per rank": turned({"own": PerRank(some("s", "r")), "m": made("m"), "rng": RNGState()}),
        "beside those of one rank": turned(
            {"b": made("b"), f"alone{rank}": Chatty("alone", asked, alone=True), "c": made("c")}
        ),
    }


@dataclasses.dataclass
class Config:
    """A leaf, by its fields."""

    names: Any
    more: Any = None


class OneWay:
    """Pickles otherwise in each process, and can't be unpickled."""

    def __reduce__(self) -> Any:
        return (_never, (os.getpid(),))


def _never(pid: int) -> None:
    raise RuntimeError("no way back")


def leaves(rank: int, odd: str) -> dict[str, Any]:
    """Name of a kind -> a leaf, equal on all ranks but for ``odd``, and pickled otherwise on each."""
    words = [f"word {number}" for number in range(12)] + ([odd] if odd else [])
    twisted = words[::-1] if rank else words
    twice = "".join(["sh", "ared"])
    again = "".join(["sh", "ared"]) if rank else twice
    array = np.arange(6.0).reshape(2, 3) + bool(odd)
    return {
        "a set": set(twisted),
        "equal strings": (twice, again, odd),
        "a dict in a tuple": (1, dict.fromkeys(twisted, 0)),
        "an array": np.asfortranarray(array) if rank else array,
        "a dataclass": Config(frozenset(twisted), (twice, again)),
        "a counter": (Counter(twisted), defaultdict(list, {word: [0] for word in twisted})),
        "a tensor in a tuple": (torch.ones(2), {word: torch.ones(1) for word in twisted}),
    }


class Stuck:
    """A Stateful, or a leaf, that hangs in one of its methods until somebody opens a pipe."""

    def __init__(self, pipe: str, method: str) -> None:
        self._pipe, self._method = pipe, method
        self._weight = torch.ones(4)  # memory that a load asks for

    def _reach(self, method: str) -> None:
        if method == self._method:
            with open(self._pipe, "rb") as pipe:
                pipe.read()

    def state_dict(self) -> State:
        self._reach("state_dict")
        return {"value": 1, "w": self._weight}

    def load_state_dict(self, state: State) -> None:
        self._reach("load_state_dict")


class StuckLeaf:
    def __init__(self, pipe: str) -> None:
        self._pipe = pipe

    def __reduce__(self) -> Any:
        with open(self._pipe, "rb") as pipe:
            pipe.read()
        return (int, (1,))


class Picky:
    """Refuses everything that is loaded, until it is told not to."""

    def __init__(self) -> None:
        self.accepts = False

    def state_dict(self) -> State:
        return {"taste": 1}

    def load_state_dict(self, state: State) -> None:
        if not self.accepts:
            raise KeyError("taste")


class ReplicaAgent(EngineAgent):
    """An engine agent that holds what a test asks for."""

    async def replica_engine(self, root: str, coordination: float = 20.0, **options: Any) -> Outcome:
        budget = options.pop("budget_bytes", None)
        overlap = options.pop("overlap", False)
        made = CheckpointEngine(
            root,
            staging=StagingOptions(part_bytes=1 << 20, budget_bytes=budget, overlap=overlap),
            coordination=Coordination(**options),
            timeouts=Timeouts(coordination=coordination, exit_grace=5.0, storage=20.0),
            trust=Trust(unsafe=True),
        )
        try:
            await made.open()
        except CheckpointError as error:
            return described(error)
        self._checkpoints["main"] = made
        return {"kind": "open"}

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._logged = Logged(level=logging.WARNING)
        logging.getLogger("dcp_async").addHandler(self._logged)

    async def finish_engine(self) -> None:
        await self._checkpoints.pop("main").abort()

    async def hold(self, kind: str, odd: float = 0.0) -> None:
        """Hold the state of a kind; ``odd`` is what this rank's differs by."""
        make, _ = KINDS[kind]
        self._state = await asyncio.to_thread(make, self._rank, self._size, odd)

    async def hold_stages(self, per_stage: int, odd: float = 0.0, large: bool = False) -> None:
        self._state = await asyncio.to_thread(
            lambda: stages(self._rank, self._size, per_stage, odd, large=large)
        )

    async def change_stage(self, element: int, by: float) -> None:
        """Add to one element of what this rank holds of its stage's tensor."""
        self._state["model"]["layers.0.weight"].to_local().view(-1)[element] += by

    async def hold_large(self, megabytes: int, odd: float = 0.0, block: int = 0, own: bool = False) -> None:
        """One large tensor, of which one element of a block of 64 KiB may differ."""
        tensor = torch.zeros(megabytes << 18)
        tensor[block * (1 << 14) + 7] = odd
        held: Any = PerRank(tensor) if own else tensor
        self._state = {"model": {"large": held, "small": torch.ones(3)}}

    async def load_fully(self, **arguments: Any) -> Outcome:
        """As ``load``, with what else the error tells."""
        try:
            report = await self._checkpoints["main"].load(self._state, **arguments)
        except CheckpointError as error:
            cause = error.__cause__
            return described(error) | {
                "tensors": getattr(error, "tensors", ()),
                "checkpoint_id": getattr(error, "checkpoint_id", None),
                "causes": [] if cause is None else [each.__name__ for each in type(cause).__mro__],
            }
        return {"kind": "loaded", "id": report.checkpoint_id}

    async def refuse_what_is_loaded(self) -> None:
        """Let the state refuse what it is given."""
        self._state["picky"] = Picky()

    async def accept_what_is_loaded(self) -> None:
        self._state["picky"].accepts = True

    async def hold_leaf(self, kind: str, odd: str = "") -> None:
        self._state = {"leaf": leaves(self._rank, odd)[kind], "w": torch.ones(2)}

    async def hold_opaque(self) -> None:
        self._state = {"leaf": OneWay(), "w": torch.ones(2)}

    # Hanging.

    async def hold_stuck(self, pipe: str, method: str) -> None:
        held: Any = StuckLeaf(pipe) if method == "__reduce__" else Stuck(pipe, method)
        self._state = {"model": {"w": torch.ones(2)}, "stuck": held}

    # Order.

    async def hold_chatty(self, layout: str) -> None:
        self._asked: list[str] = []
        self._state = chatty_states(self._rank, self._asked)[layout]

    async def hold_caching(self, layout: str) -> None:
        self._asked = []
        self._state = caching_states(self._rank, self._asked)[layout]

    async def asked(self) -> list[str]:
        found = self._asked.copy()
        self._asked.clear()
        return found

    # Random numbers.

    async def hold_rng(self, how: str, seed: int | None = None) -> None:
        """``how``: "plain", "per rank", "resized" to the first of all, "inside" of a dict that is PerRank, or
        "once", as they were saved before each rank had its own."""
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
        made: dict[str, Callable[[], Any]] = {
            "plain": RNGState,
            "per rank": lambda: PerRank(RNGState()),
            "resized": lambda: PerRank(RNGState(), on_resize=lambda saved: saved[0]),
            "inside": lambda: PerRank({"rng": RNGState(), "seen": 1}),
            "once": Once,
        }
        self._state = {"rng": made[how](), "w": torch.ones(3)}

    async def draw(self) -> list[float]:
        return [*torch.rand(2).tolist(), random.random()]

    async def warnings(self) -> list[str]:
        """What the package has logged since this was asked for last."""
        found, self._logged.texts = self._logged.texts, []
        return found
