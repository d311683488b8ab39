"""Layouts of a state over ranks, and the values that it has in any of them.

Enters: the name of a layout and of a family of states, inside of a process that is one of the layout's ranks.
Leaves: a Run, whose state can be saved or loaded into. Values are a formula of name, index and salt, and
which elements a rank holds is torch's own decision: nothing here computes an offset for a distributed tensor
of torch's.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dcp_async import AppState, PerRank

SAVED, BLANK = 1, 2
"""Salts: of what is saved, and of what a target holds before it is loaded into."""

# --- values -------------------------------------------------------------------------------------


def number(name: str, salt: int) -> int:
    """What is no tensor."""
    return zlib.crc32(f"{name}/{salt}".encode())


def bits(name: str, shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> torch.Tensor:
    """A tensor of any bits, NaNs and signed zeros among them."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    mixed = (torch.arange(nbytes) * 2654435761 + number(name, salt)) >> 13
    raw = (mixed & (1 if dtype is torch.bool else 255)).to(torch.uint8)
    return raw.view(dtype).reshape(shape)


def finite(name: str, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """A float32 tensor that may be calculated with."""
    index = torch.arange(torch.Size(shape).numel())
    mixed = (index * 2654435761 + number(name, salt)) >> 9
    return ((mixed % 65521 - 32760).to(torch.float32) / 64).reshape(shape)


def same(left: object, right: object) -> bool:
    """Equal bit for bit."""
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return type(left) is type(right) and left == right
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    one, other = (part.detach().contiguous().reshape(-1).view(torch.uint8) for part in (left, right))
    return torch.equal(one, other)


def brief(value: object) -> str:
    """For messages."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    first = value.detach().reshape(-1)[:3].tolist()
    return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {first}..."


def shortened(texts: list[str]) -> list[str]:
    """The first three, and how many more there are."""
    return texts[:3] + [f"and {len(texts) - 3} more"] * (len(texts) > 3)


# --- tensors of all sorts, one by one -----------------------------------------------------------

TENSORS: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "even": ((8, 6), torch.float32),
    "uneven": ((7, 5), torch.float32),
    "few": ((2, 3), torch.float64),  # over three ranks and more some have nothing of it
    "row": ((1, 9), torch.int32),
    "vector": ((13,), torch.bfloat16),
    "cube": ((4, 5, 6), torch.int64),
    "wide": ((3, 1000), torch.float64),
    "tall": ((1031, 3), torch.float16),
    "flags": ((11,), torch.bool),
    "bytes": ((129,), torch.uint8),
    "complex": ((6, 4), torch.complex64),
    "large": ((513, 257), torch.float32),
    "nothing": ((0, 4), torch.float32),
    "scalar": ((), torch.float32),
}

Place = Callable[[str, torch.Tensor], "torch.Tensor | None"]
"""(name, the whole) -> what stands for it on this rank, None if nothing does."""


class Rows(torch.Tensor):
    """Some rows of a larger tensor: distributed, but no DTensor, and known by DCP's hooks alone."""

    local: torch.Tensor
    first: int

    @staticmethod
    def __new__(cls, size: torch.Size, local: torch.Tensor, first: int) -> Rows:
        made: Rows = torch.Tensor._make_wrapper_subclass(cls, size, dtype=local.dtype)
        made.local, made.first = local, first
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch itself asks for a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return Rows(args[0].size(), args[0].local, args[0].first)
        raise NotImplementedError(f"{func} would see the rows of one rank only")

    @classmethod
    def cut(cls, whole: torch.Tensor, count: int, at: int) -> Rows:
        """The ``at``-th of ``count`` runs of rows of ``whole``."""
        chunks = whole.chunk(count)
        first = sum(len(chunk) for chunk in chunks[:at])
        local = chunks[at].clone() if at < len(chunks) else whole[:0].clone()
        return cls(whole.size(), local, first)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        offsets = torch.Size([self.first, *([0] * (self.dim() - 1))])
        if self.local.numel() == 0:
            return []
        return [ChunkStorageMetadata(offsets=offsets, sizes=self.local.size())]

    def __create_write_items__(self, fqn: str, value: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        assert index.offset[0] == self.first
        return self.local


def as_rows(count: int, at: int) -> Place:
    """By hooks; what has no rows stays plain."""

    def place(name: str, whole: torch.Tensor) -> torch.Tensor:
        return Rows.cut(whole, count, at) if whole.numel() > 1 else whole

    return place


def _as_dtensor(mesh: DeviceMesh, *placements: Placement) -> Place:
    def place(name: str, whole: torch.Tensor) -> torch.Tensor:
        fitting = [
            Shard(min(placement.dim, whole.dim() - 1))
            if isinstance(placement, Shard) and whole.dim()
            else Replicate()
            for placement in placements
        ]
        return distribute_tensor(whole.clone(), mesh, fitting, src_data_rank=None)

    return place


def _dtensors(shape: tuple[int, ...], *placements: Placement) -> Callable[[], Place]:
    return lambda: _as_dtensor(init_device_mesh("cpu", shape), *placements)


def _some_outside() -> Place:
    """Like experts: each tensor on a mesh of two ranks, while four run."""
    meshes = [DeviceMesh("cpu", [1, 2]), DeviceMesh("cpu", [0, 3]), DeviceMesh("cpu", [3])]
    names = list(TENSORS)

    def place(name: str, whole: torch.Tensor) -> torch.Tensor | None:
        return _as_dtensor(meshes[names.index(name) % len(meshes)], Shard(0))(name, whole)

    return place


def _disjoint() -> Place:
    """Like stages of a pipeline: each tensor is on one of the ranks, and the other knows nothing of it."""
    names, rank, size = list(TENSORS), dist.get_rank(), dist.get_world_size()
    return lambda name, whole: whole.clone() if names.index(name) % size == rank else None


def _sharded_tensors() -> Place:
    """ShardedTensors of four blocks of rows; the even ones lie on rank 0, the odd ones on rank 1."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def place(name: str, whole: torch.Tensor) -> torch.Tensor:
        if whole.numel() < 2:
            return whole.clone()
        shards, first = [], 0
        for turn, block in enumerate(whole.chunk(4)):
            if turn % size == rank:
                offsets = [first, *([0] * (whole.dim() - 1))]
                shard = sharded_tensor.Shard.from_tensor_and_offsets(block.clone(), offsets, rank)
                shards.append(shard)
            first += len(block)
        made = sharded_tensor.init_from_local_shards(shards, *whole.shape)
        assert isinstance(made, torch.Tensor)
        return made

    return place


def as_checkpointable(count: int, at: int, blocks: int) -> Place:
    """Plain tensors with torch's CheckpointableTensor protocol: every ``count``-th of ``blocks`` runs of
    rows, with a row of padding before each. What has no rows stays plain."""

    def place(name: str, whole: torch.Tensor) -> torch.Tensor:
        if whole.dim() == 0 or whole.numel() == 0:
            return whole.clone()
        rest = [0] * (whole.dim() - 1)
        local, ours, theirs, sizes, first = [whole[:0]], [], [], [], 0
        for turn, block in enumerate(whole.chunk(blocks)):
            if turn % count == at:
                ours.append((sum(map(len, local)) + 1, *rest))
                theirs.append((first, *rest))
                sizes.append(tuple(block.shape))
                local += [whole[:1], block]
            first += len(block)
        made: Any = torch.cat(local).clone()
        made.global_shape = tuple(whole.shape)
        made.global_offsets, made.local_offsets, made.local_sizes = tuple(theirs), tuple(ours), tuple(sizes)
        return cast(torch.Tensor, made)

    return place


def _plain() -> Place:
    return lambda name, whole: whole.clone()


TENSOR_LAYOUTS: dict[str, tuple[int, Callable[[], Place]]] = {
    "plain-1": (1, _plain),
    "replicated-2": (2, _plain),
    "replicated-3": (3, _plain),
    "replicated-4": (4, _plain),
    "shard0-2": (2, _dtensors((2,), Shard(0))),
    "shard0-3": (3, _dtensors((3,), Shard(0))),
    "shard0-4": (4, _dtensors((4,), Shard(0))),
    "shard1-2": (2, _dtensors((2,), Shard(1))),
    "shard1-3": (3, _dtensors((3,), Shard(1))),
    "replicate-2": (2, _dtensors((2,), Replicate())),
    "shard0_shard1-4": (4, _dtensors((2, 2), Shard(0), Shard(1))),
    "shard0_shard0-4": (4, _dtensors((2, 2), Shard(0), Shard(0))),
    "replicate_shard0-4": (4, _dtensors((2, 2), Replicate(), Shard(0))),
    "shard1_replicate-4": (4, _dtensors((2, 2), Shard(1), Replicate())),
    "outside-4": (4, _some_outside),
    "sharded_tensor-2": (2, _sharded_tensors),
    "hooks-2": (2, lambda: as_rows(2, dist.get_rank())),
    "hooks-3": (3, lambda: as_rows(3, dist.get_rank())),
    "disjoint-2": (2, _disjoint),
}

CHECKPOINTABLE_LAYOUTS: dict[str, tuple[int, Callable[[], Place]]] = {
    "checkpointable-1": (1, lambda: as_checkpointable(1, 0, 3)),
    "checkpointable-2": (2, lambda: as_checkpointable(2, dist.get_rank(), 2)),
    "checkpointable-3": (3, lambda: as_checkpointable(3, dist.get_rank(), 7)),
}
"""From torch 2.14.1 on; out of the matrix, whose sample is the same for every torch."""

# --- a model ------------------------------------------------------------------------------------

VOCAB, WIDTH, HIDDEN, DEPTH = 53, 22, 37, 2


class Block(nn.Module):
    """A layer of a Llama, without the arithmetic: nobody calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=True)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)


class Llama(nn.Module):
    """Two layers, or a stage of them."""

    def __init__(self, *, tied: bool = False, stage: int | None = None) -> None:
        super().__init__()
        mine = range(DEPTH) if stage is None else [stage]
        self.layers = nn.ModuleDict({str(at): Block() for at in mine})
        if stage in (None, 0):
            self.embedding = nn.Embedding(VOCAB, WIDTH)
        if stage in (None, DEPTH - 1):
            self.norm = nn.RMSNorm(WIDTH)
            self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.output.weight = self.embedding.weight
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", torch.zeros(11))

    def fill(self, kind: str) -> Llama:
        """Give each parameter the values that are saved of it as ``kind``."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(finite(f"{kind}.{name}", tuple(parameter.shape), SAVED))
        return self


_COLUMNS = ("wq", "wk", "wv", "w1", "w3")
_ROWS = ("wo", "w2")


def _parallelize(model: Llama, mesh: DeviceMesh) -> None:
    plan: dict[str, Any] = {"embedding": RowwiseParallel(), "output": ColwiseParallel()}
    for at in model.layers:
        plan |= {f"layers.{at}.{name}": ColwiseParallel() for name in _COLUMNS}
        plan |= {f"layers.{at}.{name}": RowwiseParallel() for name in _ROWS}
        plan[f"layers.{at}.ffn_norm"] = SequenceParallel()  # the others stay plain tensors
    parallelize_module(model, mesh, plan)


def _fully_shard(model: Llama, mesh: DeviceMesh) -> None:
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _whole(model: Llama) -> nn.Module:
    return model


def _ddp(model: Llama) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def _fsdp(*shape: int) -> Callable[[Llama], nn.Module]:
    def wrap(model: Llama) -> nn.Module:
        names = ("replicate", "shard")[-len(shape) :]
        _fully_shard(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
        return model

    return wrap


def _tensor_parallel(model: Llama) -> nn.Module:
    _parallelize(model, init_device_mesh("cpu", (2,)))
    return model


def _fsdp_and_tensor_parallel(model: Llama) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    _parallelize(model, mesh["tp"])
    _fully_shard(model, mesh["dp"])
    return model


def _fsdp1(*, mesh: bool) -> Callable[[Llama], nn.Module]:
    """With a mesh its state dicts hold DTensors, without one ShardedTensors."""
    return lambda model: FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        device_mesh=init_device_mesh("cpu", (dist.get_world_size(),)) if mesh else None,
    )


MODEL_LAYOUTS: dict[str, tuple[int, Callable[[Llama], nn.Module]]] = {
    "plain-1": (1, _whole),
    "ddp-2": (2, _ddp),
    "ddp-3": (3, _ddp),
    "ddp-4": (4, _ddp),
    "fsdp-2": (2, _fsdp(2)),
    "fsdp-3": (3, _fsdp(3)),
    "fsdp-4": (4, _fsdp(4)),
    "hsdp-4": (4, _fsdp(2, 2)),
    "tp-2": (2, _tensor_parallel),
    "fsdp_tp-4": (4, _fsdp_and_tensor_parallel),
    "fsdp1-2": (2, _fsdp1(mesh=False)),
    "fsdp1_mesh-2": (2, _fsdp1(mesh=True)),
    "pipeline-2": (2, _whole),
}
_FSDP1 = ("fsdp1-2", "fsdp1_mesh-2")

# --- families -----------------------------------------------------------------------------------


def _model_layouts(*without: str) -> tuple[str, ...]:
    return tuple(name for name in MODEL_LAYOUTS if name not in without)


FAMILIES: dict[str, tuple[str, ...]] = {
    "tensors": tuple(TENSOR_LAYOUTS),
    # an AppState; a pipeline's stages need the flat form, for lists of parameters can't be put together
    "app": _model_layouts("pipeline-2"),
    # into optimizers that have made no step, as a job does that resumes
    "resume": _model_layouts("pipeline-2"),
    "flat": _model_layouts(*_FSDP1),
    # a model and an optimizer as they are: FSDP1's give local tensors by names that look global
    "bare": _model_layouts("pipeline-2", *_FSDP1),
    "bare_resume": _model_layouts("pipeline-2", *_FSDP1),
    "tied": ("plain-1", "ddp-2", "ddp-4", "fsdp-2", "fsdp-3", "fsdp-4", "hsdp-4"),
}
"""Family of states -> the layouts that admit it."""


def world_of(family: str, layout: str) -> int:
    """How many ranks the layout has."""
    layouts = TENSOR_LAYOUTS | CHECKPOINTABLE_LAYOUTS if family == "tensors" else MODEL_LAYOUTS
    return layouts[layout][0]


def locals_of(value: torch.Tensor) -> list[torch.Tensor]:
    """What of it lies in this process."""
    if isinstance(value, DTensor):
        return [value.to_local()]
    if isinstance(value, sharded_tensor.ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    if hasattr(value, "global_offsets"):
        return [
            value[tuple(slice(low, low + extent) for low, extent in zip(start, shape, strict=True))]
            for start, shape in zip(value.local_offsets, value.local_sizes, strict=True)  # type: ignore[attr-defined]
        ]
    return [value.local if isinstance(value, Rows) else value]


Snapshot = dict[str, Any]
"""Name -> local tensor or value; copies."""


@dataclass
class Run:
    """A state in a layout, in one process."""

    state: dict[str, Any]
    """To be saved, or loaded into."""
    fill: Callable[[int], None]
    """Bring the values of a salt into it."""
    snapshot: Callable[[], Iterator[tuple[str, Any]]]
    """Name -> what of it lies here."""
    expected: Snapshot
    """The snapshot of what is saved."""

    def differences(self) -> list[str]:
        """Where it is not what was saved."""
        now = dict(self.snapshot())
        odd = [f"{name} is here or there alone" for name in now.keys() ^ self.expected.keys()]
        odd += [
            f"{name} is {brief(value)}, not {brief(self.expected[name])}"
            for name, value in now.items()
            if name in self.expected and not same(value, self.expected[name])
        ]
        return shortened(odd)


def _copied(pairs: Iterator[tuple[str, Any]]) -> Snapshot:
    return {
        name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in pairs
    }


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _own_of(rank: int, salt: int) -> dict[str, int]:
    return {"at": number(f"loader {rank}", salt)}


class Loader:
    """A Stateful that differs between ranks."""

    def __init__(self, salt: int) -> None:
        self.position = _own_of(_rank(), salt)
        self.resized: list[Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return dict(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = dict(state)

    def resize(self, saved: list[Any]) -> dict[str, Any]:
        """For PerRank: remember what is offered, take one."""
        self.resized = saved
        return dict(saved[_rank() % len(saved)])


def common_state(salt: int, loader: Loader | None) -> dict[str, Any]:
    """What every family has beside its tensors; stock knows nothing of PerRank, so it gets no loader."""
    state: dict[str, Any] = {
        "epoch": number("epoch", salt),
        "notes": {"tags": ["a", number("tags", salt)], "rate": number("rate", salt) / 7},
    }
    return state | ({"loader": PerRank(loader, on_resize=loader.resize)} if loader else {})


def check_common(state: Mapping[str, Any]) -> list[str]:
    """What of it is not as it was saved."""
    right = common_state(SAVED, None)
    return [f"{name} is {state[name]}" for name, value in right.items() if state[name] != value]


def check_loader(loader: Loader, saved_world: int) -> list[str]:
    """The same of what was PerRank on ``saved_world`` ranks."""
    wrong = []
    here = dist.get_world_size() if dist.is_initialized() else 1
    offered = [_own_of(rank, SAVED) for rank in range(saved_world)] if saved_world != here else None
    if loader.resized != offered:
        wrong.append(f"on_resize was given {loader.resized}, not {offered}")
    if loader.position != _own_of(_rank() % saved_world, SAVED):
        wrong.append(f"the loader is at {loader.position}")
    return wrong


def build(family: str, layout: str) -> Run:
    """This process's part. Ranks: all must call it, for torch's own set-up is collective."""
    return _build_tensors(layout) if family == "tensors" else _build_model(family, layout)


def _build_tensors(layout: str) -> Run:
    place = (TENSOR_LAYOUTS | CHECKPOINTABLE_LAYOUTS)[layout][1]()
    versions: dict[int, dict[str, torch.Tensor]] = {}
    for salt in (SAVED, BLANK):
        placed = {
            name: place(name, bits(name, shape, dtype, salt)) for name, (shape, dtype) in TENSORS.items()
        }
        versions[salt] = {name: value for name, value in placed.items() if value is not None}
    run_tensors = versions[BLANK]

    def snapshot_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, Any]]:
        for name, tensor in tensors.items():
            for at, local in enumerate(locals_of(tensor)):
                yield f"{name}/{at}", local

    copies = {salt: _copied(snapshot_of(versions[salt])) for salt in versions}

    def fill(salt: int) -> None:
        for name, local in snapshot_of(run_tensors):
            local.copy_(copies[salt][name])

    return Run({"t": run_tensors}, fill, lambda: snapshot_of(run_tensors), copies[SAVED])


_KINDS = ("param", "exp_avg", "exp_avg_sq")


def is_vector(name: str) -> bool:
    """Of the second of the optimizer's two groups; FSDP1's parameters do not tell by their shapes."""
    return "norm" in name or name.endswith("bias")


def _build_model(family: str, layout: str) -> Run:
    wrap = MODEL_LAYOUTS[layout][1]
    stage = dist.get_rank() if layout.startswith("pipeline") else None

    def fresh() -> Llama:
        return Llama(tied=family == "tied", stage=stage)

    values: dict[str, list[torch.Tensor]] = {}
    for kind in _KINDS:  # the optimizer's tensors are cut as parameters of the same size are
        model = wrap(fresh().fill(kind))
        values[kind] = [locals_of(parameter)[0].clone() for parameter in model.parameters()]
    model = wrap(fresh())
    parameters = list(model.parameters())
    groups = [
        {"params": [part for name, part in model.named_parameters() if is_vector(name) == vectors]}
        for vectors in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.5)

    def make_steps() -> None:
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        optimizer.zero_grad()

    make_steps()

    def bring(tensor: torch.Tensor, saved: torch.Tensor, salt: int) -> None:
        local = locals_of(tensor)[0]
        if salt == SAVED:
            local.copy_(saved)
        else:
            local.fill_(-1.5)

    def fill(salt: int) -> None:
        if "resume" in family:
            optimizer.state.clear()
        if not ("resume" in family and salt == BLANK) and not optimizer.state:
            make_steps()
        with torch.no_grad():
            for at, parameter in enumerate(model.parameters()):
                bring(parameter, values["param"][at], salt)
                if entry := optimizer.state.get(parameter):
                    entry["step"].fill_(salt + 1)
                    for kind in _KINDS[1:]:
                        bring(entry[kind], values[kind][at], salt)
            for buffer in model.buffers():
                buffer.copy_(finite("frequencies", (11,), salt))
        for group in optimizer.param_groups:
            group["lr"] = salt / 16

    def snapshot() -> Iterator[tuple[str, Any]]:
        for name, buffer in model.named_buffers():
            yield name, buffer
        for at, group in enumerate(optimizer.param_groups):
            yield f"lr/{at}", group["lr"]
        for name, parameter in model.named_parameters():
            yield name, locals_of(parameter)[0]
            if not parameter.numel():
                continue  # of FSDP1's that lie elsewhere torch restores no state here
            for kind, value in optimizer.state.get(parameter, {}).items():
                yield f"{name}/{kind}", locals_of(value)[0]
                yield f"{name}/{kind}/type", type(value).__name__

    options = StateDictOptions(flatten_optimizer_state_dict=True) if family == "flat" else None
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    state: dict[str, Any] = (
        {"model": inner, "optim": optimizer}
        if family.startswith("bare")
        else {"app": AppState(model, optimizer, options=options)}
    )
    fill(SAVED)
    return Run(state, fill, snapshot, _copied(snapshot()))


# --- the whole, as one process sees it ----------------------------------------------------------


def whole(family: str) -> dict[str, torch.Tensor]:
    """Name in the checkpoint -> tensor, of the tensors that a family has."""
    if family == "tensors":
        return {f"t.{name}": bits(name, *TENSORS[name], SAVED) for name in TENSORS}
    model = Llama(tied=family == "tied")
    prefix, optim = (
        ("model", "optim.state") if family.startswith("bare") else ("app.model", "app.optim.state")
    )
    frequencies = finite("frequencies", (11,), SAVED)
    found = {f"{prefix}.frequencies": frequencies}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(parameters.items())}
    for name, parameter in parameters.items():
        canonical = first[id(parameter)]
        found[f"{prefix}.{name}"] = finite(f"param.{canonical}", tuple(parameter.shape), SAVED)
    order = sorted((name for name, _ in model.named_parameters()), key=is_vector)
    for at, name in enumerate(order):
        shape = tuple(parameters[name].shape)
        base = f"{optim}.{at if family.startswith('bare') else name}"
        for kind in _KINDS[1:]:
            found[f"{base}.{kind}"] = finite(f"{kind}.{name}", shape, SAVED)
        found[f"{base}.step"] = torch.tensor(float(SAVED + 1))
    return found
