"""SafetensorsFormat: others load its files without us, and the checkpoint restores all that was saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from dcp_async import (
    CheckpointEngine,
    CheckpointExistsError,
    Coordination,
    CorruptCheckpointError,
    Limits,
    PlanningOptions,
    SaveError,
    Stager,
    StagingOptions,
    Timeouts,
    Trust,
    open_checkpoint,
    sync,
)
from dcp_async.engine.resources import make_setup
from dcp_async.formats import DistcpFormat, SafetensorsFormat
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same, blank


def net(width: int = 33) -> nn.Module:
    torch.manual_seed(width)
    half = nn.Linear(17, 300).to(torch.bfloat16)
    return nn.Sequential(nn.Linear(width, 17), nn.BatchNorm1d(17), half)


def state_of(model: nn.Module) -> dict[str, Any]:
    """The optimizer first: what is public does not come first in the state."""
    optim = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step()
    return {
        "optim": optim,
        "model": model,
        "odd": {1: torch.ones(3, dtype=torch.complex128), "t": torch.arange(12.0).view(3, 4).t()},
        "step": 3,
        "empty": torch.zeros(0, 4),
    }


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            assert all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 3000])
async def test_safetensors_loads_the_weights_and_the_engine_everything(
    shard_bytes: int, overlap: bool, tmp_path: Path
) -> None:
    model = net()
    state, chosen = state_of(model), SafetensorsFormat("model", max_shard_bytes=shard_bytes)
    # small parts: tensors, files and parts end at different places
    options = StagingOptions(overlap=overlap, part_bytes=64 * 1024)
    async with CheckpointEngine(tmp_path, format=chosen, staging=options) as engine:
        response = await engine.save(state, step=1)
        await response.staging_completion
        await engine.wait()
        saved = {name: value.clone() for name, value in model.state_dict().items()}
        assert_same(weights_in(tmp_path / "step-00000001"), saved)
        everything = await engine.read()
        assert_same(everything["model"], saved)
        assert_same(everything["odd"], state["odd"])
        assert_same(everything["empty"], state["empty"])
        # of the same structure, so by the plan that was kept
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        await (await engine.save(state, step=2)).upload_completion
        doubled = {name: value.clone() for name, value in model.state_dict().items()}
        assert_same(weights_in(tmp_path / "step-00000002"), doubled)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state |= {"step": 0, "odd": blank(state["odd"])}
        await engine.load(state, 1)
        assert_same(dict(model.state_dict()), saved)
        assert_same(state["optim"].state_dict()["state"], everything["optim"]["state"])
        assert_same((state["step"], state["odd"]), (3, everything["odd"]))
        assert (await engine.verify(1)).ok


async def test_a_state_of_tensors_alone_is_public_under_its_own_names(tmp_path: Path) -> None:
    model = net()
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat(metadata={"run": "a"})) as engine:
        await (await engine.save(model.state_dict(), checkpoint_id="m")).upload_completion
    assert_same(load_file(tmp_path / "m" / "model.safetensors"), dict(model.state_dict()))
    assert sorted(path.suffix for path in (tmp_path / "m").iterdir()) == [
        "", ".blob", ".digests", ".json", ".safetensors",
    ]  # fmt: skip
    # nothing of ours is needed to read a copy of the one file
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.safetensors").write_bytes((tmp_path / "m" / "model.safetensors").read_bytes())
    async with open_checkpoint(tmp_path / "copy") as checkpoint:
        assert_same(await checkpoint.read(), dict(model.state_dict()))


async def test_an_index_names_every_tensor_and_its_file(tmp_path: Path) -> None:
    model = net()
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat(max_shard_bytes=4000)) as engine:
        await (await engine.save(model.state_dict(), checkpoint_id="m")).upload_completion
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "m" / file)[name], model.state_dict()[name])
    count = len(set(index["weight_map"].values()))
    assert count > 1
    assert set(index["weight_map"].values()) == {
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    }
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in model.state_dict().values())


async def test_ties_are_stored_once_and_load_model_ties_them_again(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.head = nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat("model")) as engine:
        await (await engine.save({"model": model}, checkpoint_id="m")).upload_completion
        read = (await engine.read())["model"]
        assert read["embed.weight"] is read["head.weight"]
    file = tmp_path / "m" / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert list(opened.keys()) == ["embed.weight"]
        assert opened.metadata() == {"format": "pt", "head.weight": "embed.weight"}
    fresh = Tied()
    assert not any(load_model(fresh, file))
    assert torch.equal(fresh.head.weight, model.head.weight)


def test_stock_reads_the_weights_as_those_of_hugging_face(tmp_path: Path) -> None:
    model = net()
    with sync.CheckpointEngine(tmp_path, format=SafetensorsFormat("model")) as engine:
        engine.save({"model": model, "step": 3}, checkpoint_id="m").upload_completion.result()
    targets = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    stock.load(targets, storage_reader=HuggingFaceStorageReader(str(tmp_path / "m")), no_dist=True)
    assert_same(targets, dict(model.state_dict()))


async def test_a_replaced_checkpoint_leaves_no_name_of_the_old_one(tmp_path: Path) -> None:
    sharded, whole = SafetensorsFormat(max_shard_bytes=4000), SafetensorsFormat()
    async with CheckpointEngine(tmp_path, format=sharded) as engine:
        await (await engine.save(net(33).state_dict(), checkpoint_id="m")).upload_completion
        await (await engine.save(net(34).state_dict(), checkpoint_id="m", replace=True)).upload_completion
    assert_same(weights_in(tmp_path / "m"), dict(net(34).state_dict()))
    (tmp_path / "m" / "config.json").write_text("{}")  # the user's own
    async with CheckpointEngine(tmp_path, format=whole) as engine:
        await (await engine.save(net(35).state_dict(), checkpoint_id="m", replace=True)).upload_completion
    names = {path.name for path in (tmp_path / "m").iterdir()}
    others = {name for name in names if not name.startswith((".", "_", "manifest"))}
    assert others == {"model.safetensors", "config.json"}
    assert_same(weights_in(tmp_path / "m"), dict(net(35).state_dict()))
    async with CheckpointEngine(tmp_path) as engine:  # by a format without public names
        await (await engine.save(net(36).state_dict(), checkpoint_id="m", replace=True)).upload_completion
        assert_same(await engine.read("m"), dict(net(36).state_dict()))
    assert not list((tmp_path / "m").glob("*.safetensors"))


async def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_text("mine")
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat()) as engine:
        response = await engine.save(net().state_dict(), checkpoint_id="m")
        with pytest.raises(SaveError, match=r"model\.safetensors lies there, .* move it away"):
            await response.upload_completion
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "m" / "model.safetensors").read_text() == "mine"


async def test_a_name_that_cannot_be_made_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if str(target).endswith("index.json"):
            raise OSError(5, "no")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuse)
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat(max_shard_bytes=4000)) as engine:
        response = await engine.save(net().state_dict(), checkpoint_id="m")
        with pytest.raises(SaveError):
            await response.upload_completion
        assert await engine.latest() is None
    assert not (tmp_path / "m").exists()


KILLED = """
import os, sys
from dcp_async import sync
from dcp_async.engine.resources import make_setup
from dcp_async.formats import SafetensorsFormat
from dcp_async.storage.local import public_names
from tests.pipeline.test_safetensors_format import net

with sync.CheckpointEngine(sys.argv[1], format=SafetensorsFormat(max_shard_bytes=4000)) as engine:
    engine.save(net(33).state_dict(), checkpoint_id="m").upload_completion.result()
    public_names.{where} = lambda *arguments: os._exit(7)
    engine.save(net(34).state_dict(), checkpoint_id="m", replace=True).upload_completion.result()
"""


def kill(root: Path, where: str) -> None:
    code = KILLED.replace("{where}", where)
    done = subprocess.run([sys.executable, "-c", code, str(root)], check=False, timeout=120)
    assert done.returncode == 7


def test_a_kill_between_the_commit_and_the_names_is_finished_by_the_next_save(tmp_path: Path) -> None:
    kill(tmp_path, "give_prepared")
    assert not list((tmp_path / "m").glob("*.safetensors"))
    with sync.CheckpointEngine(tmp_path) as engine:
        assert_same(engine.read("m"), dict(net(34).state_dict()))
        engine.save({}, checkpoint_id="other").upload_completion.result()
    assert_same(weights_in(tmp_path / "m"), dict(net(34).state_dict()))
    assert not list((tmp_path / "m").glob(".copy-*"))


def test_a_kill_before_the_commit_leaves_the_old_one_for_everybody(tmp_path: Path) -> None:
    kill(tmp_path, "PublicNames.prepare")
    assert_same(weights_in(tmp_path / "m"), dict(net(33).state_dict()))
    with sync.CheckpointEngine(tmp_path, format=SafetensorsFormat()) as engine:
        assert_same(engine.read("m"), dict(net(33).state_dict()))
        # and what it left is swept by the next
        engine.save(net(35).state_dict(), checkpoint_id="m", replace=True).upload_completion.result()
    assert len(list((tmp_path / "m").glob("*.blob"))) == 1


@pytest.mark.parametrize("place", ["header", "payload", "digests"])
async def test_a_flipped_bit_is_told(place: str, tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat()) as engine:
        await (await engine.save(net().state_dict(), checkpoint_id="m")).upload_completion
        suffix, at = {"header": (".blob", 20), "payload": (".blob", -20), "digests": (".digests", 3)}[place]
        (file,) = (tmp_path / "m").glob(f"*{suffix}")
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        assert not (await engine.verify("m")).ok
        if place != "header":  # no tensor lies there, and a load reads what it needs
            with pytest.raises(CorruptCheckpointError):
                await engine.read("m")


async def test_one_tensor_of_a_file_is_read_alone(tmp_path: Path) -> None:
    state = {"a": torch.arange(1 << 18), "b": torch.arange(1 << 18).neg()}
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat()) as engine:
        await (await engine.save(state, checkpoint_id="m")).upload_completion
        async with engine.checkpoint("m") as checkpoint:
            part = await checkpoint.tensor("b", (slice(5, 1000, 7),))
    assert torch.equal(part, state["b"][5:1000:7])


async def test_memory_holds_the_same_files(tmp_path: Path) -> None:
    model = net()
    async with CheckpointEngine("memory://safetensors-format", format=SafetensorsFormat()) as engine:
        await (await engine.save(model.state_dict(), checkpoint_id="m")).upload_completion
        assert_same(await engine.read("m"), dict(model.state_dict()))


@pytest.mark.parametrize("overlap", [False, True])
async def test_small_and_large_tensors_of_a_device_lie_where_the_header_says(
    overlap: bool, tmp_path: Path
) -> None:
    fake = FakeAccelerator()
    dtypes = [torch.bfloat16, torch.float32, torch.int64, torch.bool]
    host = {
        f"{number}": torch.arange(size).remainder(100).to(dtypes[number % 4])
        for number, size in enumerate([7, 5, 3, 9, 70_000, 33, 40_000, 1, 65, 64])
    }
    negative = {name: value.logical_not().to(value.dtype) for name, value in host.items()}
    state, other = (
        {name: fake.tensor(value) for name, value in values.items()} for values in (host, negative)
    )
    async with (
        Stager(StagingOptions(part_bytes=64 * 1024, overlap=overlap), backend=fake) as stager,
        CheckpointEngine(tmp_path, format=SafetensorsFormat("w"), staging=stager) as engine,
    ):
        for name in ("first", "second"):  # by a new plan, and by one that is known
            # what comes first in the state lies behind
            response = await engine.save({"other": other, "w": state}, checkpoint_id=name)
            await response.upload_completion
            assert_same(load_file(tmp_path / name / "model.safetensors"), host)
            assert_same((await engine.read(name))["other"], negative)


class Bucket:
    """As much of a Storage as is asked for in ``open()``."""

    async def begin(self) -> None:
        raise NotImplementedError


class OneWriter(Bucket):
    gives_public_names = True


@pytest.mark.parametrize(
    ("storage", "world_size", "says"),
    [(OneWriter(), 2, r"all 2 ranks write into the same files, .*gather the weights"), (Bucket(), 1, "copy")],
)
def test_a_storage_that_cannot_hold_such_files_is_refused(storage: Any, world_size: int, says: str) -> None:
    setup = make_setup(
        storage,
        StagingOptions(),
        planning=PlanningOptions(),
        format=SafetensorsFormat(),
        coordination=Coordination(),
        limits=Limits(),
        timeouts=Timeouts(),
        trust=Trust(),
        observer=None,
    )
    with pytest.raises(ValueError, match=says):
        setup.check_ranks(world_size)


async def test_what_is_no_format_and_a_name_that_is_taken_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a Format"):
        CheckpointEngine(tmp_path, format="safetensors")  # type: ignore[arg-type]
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat()) as engine:
        await (await engine.save(net().state_dict(), checkpoint_id="m")).upload_completion
        with pytest.raises(CheckpointExistsError):
            await (await engine.save(net().state_dict(), checkpoint_id="m")).upload_completion


async def test_weights_that_are_not_there_fail_the_save(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path, format=SafetensorsFormat("modle")) as engine:
        with pytest.raises(SaveError, match="the state has model"):
            await engine.save({"model": net()}, checkpoint_id="m")
    assert not (tmp_path / "m").exists()


async def test_the_default_is_dcps_format(tmp_path: Path) -> None:
    for number, arguments in enumerate(({}, {"format": DistcpFormat()})):
        async with CheckpointEngine(tmp_path, **arguments) as engine:  # type: ignore[arg-type]
            await (await engine.save({"model": net()}, checkpoint_id=f"{number}")).upload_completion
        (manifest,) = (tmp_path / f"{number}").glob("manifest-*.json")
        assert json.loads(manifest.read_text())["version"] == 1
        assert {path.suffix for path in (tmp_path / f"{number}").iterdir()} == {"", ".distcp", ".json"}
