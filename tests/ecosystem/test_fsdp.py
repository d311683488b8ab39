"""FSDP of both kinds on two ranks: what an AppState hands back of optimizers over sharded parameters."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import AdamW

from dcp_async import AppState
from dcp_async.sync import CheckpointEngine

WORLD = 2
CPU = torch.device("cpu")


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))


def _fsdp1(orig: bool, around: Callable[[nn.Module], Any], inside: Callable[[nn.Module], Any]) -> nn.Module:
    model = _layers()
    model[1] = around(FullyShardedDataParallel(inside(model[1]), use_orig_params=orig, device_id=CPU))
    return FullyShardedDataParallel(model, use_orig_params=orig, device_id=CPU)


def _same(module: nn.Module) -> nn.Module:
    return module


def _compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def _fsdp2(inside: Callable[[nn.Module], Any]) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    model = _layers()
    model[1] = inside(model[1])
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "flat": lambda: _fsdp1(False, _same, _same),
    "flat, recomputed inside": lambda: _fsdp1(False, _same, checkpoint_wrapper),
    "flat, recomputed around": lambda: _fsdp1(False, checkpoint_wrapper, _same),
    "flat, compiled inside": lambda: _fsdp1(False, _same, _compiled),
    "own parameters": lambda: _fsdp1(True, _same, _same),
    "own parameters, recomputed inside": lambda: _fsdp1(True, _same, checkpoint_wrapper),
    "own parameters, recomputed around": lambda: _fsdp1(True, checkpoint_wrapper, _same),
    "own parameters, compiled inside": lambda: _fsdp1(True, _same, _compiled),
    "fsdp2": lambda: _fsdp2(_same),
    "fsdp2, recomputed": lambda: _fsdp2(checkpoint_wrapper),
}
OPTIONS = {
    "default": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
}
HISTORIES = ("stepped", "frozen now", "no step yet")


def _step(model: Any, optim: Any) -> None:
    optim.zero_grad()
    model(torch.arange(8.0).view(2, 4) * (dist.get_rank() + 1)).square().sum().backward()
    optim.step()


def _build(kind: str, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = MODELS[kind]()
    return model, AdamW(model.parameters(), lr=0.1)


def _picture(model: Any, optim: Any) -> list[Any]:
    found = []
    for weight in model.parameters():
        entry = optim.state.get(weight)
        found.append((weight.detach().clone(), {k: v.clone() for k, v in entry.items()} if entry else None))
    return found


def _equal(one: list[Any], other: list[Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        local = [getattr(value, "_local_tensor", value) for value in (a, b)]
        return torch.equal(*local)

    return all(
        same(weight, mine)
        and (entry is None) == (own is None)
        and (entry is None or (entry.keys() == own.keys() and all(same(entry[k], own[k]) for k in own)))
        for (weight, entry), (mine, own) in zip(one, other, strict=True)
    )


def _resumes(engine: Any, kind: str, options: StateDictOptions, history: str) -> str:
    one, other = _build(kind, 1), _build(kind, 2)
    if history != "no step yet":
        _step(*one)
    if history == "frozen now":
        for weight in [*other[0][1].parameters()]:
            weight.requires_grad_(False)
    engine.save({"app": AppState(*one, options=options)}).upload_completion.result()
    engine.load({"app": AppState(*other, options=options)})
    return "ok" if _equal(_picture(*other), _picture(*one)) else "differs"


def main(rank: int, port: int, root: Path) -> None:
    """One rank: every kind, option and history; what each came to lies in a file."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    torch.compiler.set_stance("force_eager")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {}
    with CheckpointEngine(root / "run") as engine:
        for kind in MODELS:
            for name, options in OPTIONS.items():
                for history in HISTORIES:
                    try:
                        found[f"{kind}, {name}, {history}"] = _resumes(engine, kind, options, history)
                    except Exception:  # shown by the test of its name
                        found[f"{kind}, {name}, {history}"] = traceback.format_exc()
    torch.save(found, root / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    root = tmp_path_factory.mktemp("fsdp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from pathlib import Path; import tests.ecosystem.test_fsdp as t; t.main"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}({rank}, {port}, Path({str(root)!r}))"],
            cwd=Path(__file__).parents[2],
        )
        for rank in range(WORLD)
    ]
    assert [rank.wait(500) for rank in ranks] == [0] * WORLD
    return [torch.load(root / f"found-{rank}.pt") for rank in range(WORLD)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_sharded_run_resumes(found: list[dict[str, str]], kind: str, options: str, history: str) -> None:
    for rank in range(WORLD):
        outcome = found[rank][f"{kind}, {options}, {history}"]
        assert outcome == "ok", outcome
