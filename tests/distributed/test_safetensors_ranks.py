"""SafetensorsFormat on several ranks: the files of one process that holds everything, or nothing at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from dcp_async import CheckpointEngine, Coordination, PerRank, PlanningOptions, StagingOptions
from dcp_async.formats import SafetensorsFormat
from dcp_async.sync import CheckpointEngine as BlockingEngine
from tests.distributed.engine_agent import EngineAgent, Outcome, whole
from tests.distributed.harness import World
from tests.support.doubles import assert_same

STAGING = StagingOptions(part_bytes=128 * 1024)
"""Small parts: shards, blocks and parts end at different places."""


def net() -> nn.Module:
    torch.manual_seed(5)
    # rows of odd lengths; some shards hold whole blocks of checksums, some lie within one
    return nn.Sequential(nn.Linear(333, 700), nn.BatchNorm1d(700), nn.Linear(700, 3).to(torch.bfloat16))


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def with_optim(model: nn.Module) -> dict[str, Any]:
    optim = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    return {"optim": optim, "model": model, "step": 3}


def spread(weights: dict[str, torch.Tensor], size: int, layout: str) -> dict[str, Any]:
    """DTensors: on the last dimension, on one and then the other, or replicated."""
    if layout == "both":
        mesh = init_device_mesh("cpu", (size // 2 or 1, min(size, 2)))
        return {
            name: distribute_tensor(value, mesh, [Shard(0), Shard(value.dim() - 1)] if value.dim() else None)
            for name, value in weights.items()
        }
    mesh = init_device_mesh("cpu", (size,))

    def placement(value: torch.Tensor) -> Placement:
        return Shard(value.dim() - 1) if value.dim() and layout == "last" else Replicate()

    return {name: distribute_tensor(value, mesh, [placement(value)]) for name, value in weights.items()}


class OwnPlanner(DefaultSavePlanner):
    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object)


def ties(weight: dict[str, torch.Tensor], planner: str) -> dict[str, torch.Tensor]:
    """A second name for a tensor; what a planner hands out has one each."""
    return {} if planner == "own" else {"tied": weight["0.weight"]}


PLANNERS = {
    "none": PlanningOptions(),
    "option": PlanningOptions(save=partial(DefaultSavePlanner, dedup_save_to_lowest_rank=True)),
    "own": PlanningOptions(save=OwnPlanner),
}


class FormatAgent(EngineAgent):
    """Saves and loads models, by an engine that lives as long as a verb."""

    def _sharded(self, layout: str) -> dict[str, Any]:
        if layout == "fsdp":
            model: Any = net()
            mesh = init_device_mesh("cpu", (self._size,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
            return with_optim(model)
        weights = weights_of(net())
        if layout == "stages":  # each rank has layers of its own, and the last one first
            mine = [name for number, name in enumerate(weights) if number % self._size == self._rank]
            return {"model": {name: weights[name] for name in reversed(mine)}, "step": 3}
        return {"model": spread(weights, self._size, layout), "step": 3}

    async def publish(self, root: str, layout: str, shard_bytes: int, saves: int) -> None:
        chosen = SafetensorsFormat("model", max_shard_bytes=shard_bytes)
        state = self._sharded(layout)
        async with CheckpointEngine(root, format=chosen, staging=STAGING) as engine:
            for step in range(saves):
                await (await engine.save(state, step=step)).upload_completion

    async def publish_planned(self, root: str, planner: str) -> None:
        """By a planner: the engine's own, DCP's with an option, one that overrides a method of DCP's."""
        weight = {name: value for name, value in weights_of(net()).items() if value.numel() > 3}
        state = {"model": weight | ties(weight, planner), "rank": PerRank(self._rank)}
        chosen = SafetensorsFormat("model")
        async with CheckpointEngine(
            root, format=chosen, planning=PLANNERS[planner], staging=STAGING
        ) as engine:
            await engine.save(state, step=0)

    async def restore(self, root: str, layout: str) -> list[str]:
        """Names of what does not come back."""
        state = self._sharded(layout)
        if layout == "fsdp":
            wanted = [value.to_local().clone() for value in state["model"].parameters()]
            with torch.no_grad():
                for parameter in state["model"].parameters():
                    parameter.zero_()
        else:
            wanted = [local(value).clone() for value in state["model"].values()]
            for value in state["model"].values():
                local(value).zero_()
        async with CheckpointEngine(root) as engine:
            await engine.load(state)
        loaded = state["model"].parameters() if layout == "fsdp" else state["model"].values()
        pairs = zip(loaded, wanted, strict=True)
        return [
            f"{number}" for number, (value, saved) in enumerate(pairs) if not torch.equal(local(value), saved)
        ]


def local(value: Any) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def public_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("model*.safetensors*")}


def alone(root: Path, shard_bytes: int, *, with_optimizer: bool = False) -> dict[str, bytes]:
    """What one process writes of the same."""
    chosen = SafetensorsFormat("model", max_shard_bytes=shard_bytes)
    with BlockingEngine(root, format=chosen, coordination=Coordination(mode="local")) as engine:
        state = with_optim(net()) if with_optimizer else {"model": weights_of(net()), "step": 3}
        engine.save(state, step=0)
    return public_in(root / "step-00000000")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], World]]:
    made: dict[int, World] = {}

    def of(size: int) -> World:
        if size not in made:
            made[size] = World(size, tmp_path_factory.mktemp("world"), kind=FormatAgent)
            made[size].__enter__()
        return made[size]

    yield of
    for world in made.values():
        world.__exit__(None, None, None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "size" in metafunc.fixturenames:
        full = metafunc.config.getoption("--matrix") == "full"
        metafunc.parametrize("size", [2, 4] if full else [2])


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 500_000])
@pytest.mark.parametrize("layout", ["fsdp", "last", "both", "whole", "stages"])
def test_ranks_write_the_files_of_one_process(
    layout: str, shard_bytes: int, size: int, worlds: Callable[[int], World], tmp_path: Path
) -> None:
    root = tmp_path / "ranks"
    # the second goes by the plan of the first
    worlds(size).all("publish", root=str(root), layout=layout, shard_bytes=shard_bytes, saves=2)
    model, wanted = net(), alone(tmp_path / "one", shard_bytes, with_optimizer=layout == "fsdp")
    expected = weights_of(with_optim(model)["model"] if layout == "fsdp" else model)
    for step in range(2):
        directory = root / f"step-{step:08d}"
        found = public_in(directory)
        assert found.keys() == wanted.keys()
        assert len(found) == (1 if shard_bytes > 10**9 else 4)
        assert found == wanted
        assert not list(directory.glob("*.pieces"))
        loaded: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
            loaded |= load_file(file)
        assert_same(loaded, expected)
    assert worlds(size).all("restore", root=str(root), layout=layout) == [[]] * size
    with BlockingEngine(root, coordination=Coordination(mode="local")) as engine:
        assert engine.verify().ok
        assert_same(dict(engine.read(keys=["model"])["model"]), dict(expected))


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_planner_changes_nothing_of_the_files(
    planner: str, worlds: Callable[[int], World], tmp_path: Path
) -> None:
    worlds(2).all("publish_planned", root=str(tmp_path / "ranks"), planner=planner)
    weight = {name: value for name, value in weights_of(net()).items() if value.numel() > 3}
    chosen, state = SafetensorsFormat("model"), {"model": weight | ties(weight, planner)}
    with BlockingEngine(tmp_path, format=chosen, coordination=Coordination(mode="local")) as engine:
        engine.save(state, checkpoint_id="one")
    with BlockingEngine(tmp_path / "ranks", coordination=Coordination(mode="local")) as engine:
        assert engine.verify().ok
        assert_same(engine.read(keys=["model"])["model"], state["model"])
    wanted = public_in(tmp_path / "one")
    assert list(wanted) == ["model.safetensors"]
    assert public_in(tmp_path / "ranks" / "step-00000000") == wanted


def test_whole_blocks_are_written_once_and_in_place(worlds: Callable[[int], World], tmp_path: Path) -> None:
    worlds(2).all("publish", root=str(tmp_path), layout="fsdp", shard_bytes=1 << 40, saves=1)
    (manifest,) = tmp_path.glob("step-*/manifest-*.json")
    files = json.loads(manifest.read_text())["files"]
    (public,) = (file for file in files if file.get("public_name"))
    assert public["public_name"] == "model.safetensors"
    # its links are our name and the public one; ranks' own files hold the optimizer
    assert os.stat(manifest.parent / public["name"]).st_nlink == 2
    assert {file["name"].split("-")[0] for file in files} == {"__0_0", "__1_0"}


class Job:
    """Two ranks with engines whose storage can be told to stumble."""

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root = world, root
        opened = self.world.all("engine", root=str(root), weights="model", coordination=2.0)
        assert kinds(opened) == ["open"] * 2, opened

    def save(self, number: int, **arguments: Any) -> list[Outcome]:
        self.world.all("fill", value=number)
        return [call.result() for call in self.world.begin("save", step=number, **arguments)]

    def assert_only(self, *steps: int) -> None:
        """Of each of ``steps`` all is there, for everybody, and nothing else lies anywhere."""
        assert {path.name for path in self.root.iterdir()} == {f"step-{step:08d}" for step in steps}
        for step in steps:
            directory = self.root / f"step-{step:08d}"
            (manifest,) = directory.glob("manifest-*.json")
            uid = manifest.name[9:-5]
            ours = {f"__0_0-{uid}.{kind}" for kind in ("blob", "digests", "distcp")} | {f"__1_0-{uid}.distcp"}
            assert {path.name for path in directory.iterdir()} == ours | {
                ".metadata",
                "model.safetensors",
                manifest.name,
            }
            assert_same(load_file(directory / "model.safetensors"), whole(2, step)["model"])


@pytest.fixture
def job(make_world: Callable[..., World], tmp_path: Path) -> Job:
    root = tmp_path / "root"
    root.mkdir()
    made = Job(make_world(2, kind=EngineAgent), root)
    assert kinds(made.save(1)) == ["committed"] * 2
    return made


def kinds(outcomes: list[Outcome]) -> list[str]:
    return [outcome["kind"] for outcome in outcomes]


POINTS = [
    (1, "begin_shared"),
    (1, "put"),
    (1, "seal"),
    (1, "fetch"),
    (0, "fetch"),
    (0, "drop"),
    (0, "commit"),
]


def test_whatever_fails_before_the_commit_leaves_nothing(job: Job) -> None:
    for rank, verb in POINTS:
        job.world[rank].do("fail_verb", at=verb)
        assert kinds(job.save(2)) == ["SaveError"] * 2, verb
        job.assert_only(1)
        job.world[rank].do("heal")
    assert kinds(job.save(3)) == ["committed"] * 2
    job.assert_only(1, 3)


@pytest.mark.parametrize("verb", ["fetch", "drop"])
def test_a_cancelled_save_leaves_nothing(verb: str, job: Job) -> None:
    job.world[0].do("hold_verb", at=verb)
    job.world.all("fill", value=2)
    calls = job.world.begin("save", step=2)
    job.world[0].do("until_held", at=verb)
    job.world[0].do("cancel_save")
    job.world[0].do("release_verb", at=verb)
    assert kinds([call.result() for call in calls]) == ["SaveCancelled"] * 2
    job.assert_only(1)
    job.world[0].do("heal")
    assert kinds(job.save(3)) == ["committed"] * 2
    job.assert_only(1, 3)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_pieces_are_put_together_leaves_the_old_checkpoint(
    victim: int, job: Job
) -> None:
    job.world[victim].do("kill_in", point="fetch")
    job.world.all("fill", value=1)
    calls = job.world.begin("save", step=1, replace=True)
    assert calls[1 - victim].result()["kind"] == "SaveError"
    if victim == 0:  # the one that tidies up: the next save does
        job.world[1].kill()
        with BlockingEngine(job.root, coordination=Coordination(mode="local")) as engine:
            engine.save({}, step=7)
        shutil.rmtree(job.root / "step-00000007")
    job.assert_only(1)
