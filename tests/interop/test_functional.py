"""DCP's functions, awaited and blocking: stock reads what they save, they read what stock saves."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import nn
from torch.distributed.checkpoint import _checkpointer
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import dcp_async.sync
from dcp_async import (
    CheckpointError,
    CheckpointNotFoundError,
    EngineStateError,
    IncompatibleStateError,
    SaveError,
    Trust,
    functional,
    interop,
)
from dcp_async.storage.local.transaction import LocalTransaction
from tests.support.doubles import assert_same, committed, flip, leftovers

NAMES = ("save", "load", "async_save", "save_state_dict", "load_state_dict", "Checkpointer")


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def state_of(seed: int = 0) -> dict[str, Any]:
    model, optimizer = trained(seed)
    # int keys and empty containers are what stock loses or trips over
    return {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "extra": {"by_number": {7: torch.full((3,), 7.0), 8: 8}, "empty": {}, "none": [], "epoch": 3},
    }


def blank(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    if isinstance(state, list):
        return [blank(value) for value in state]
    return torch.zeros_like(state) if isinstance(state, torch.Tensor) else 0


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``call("save", ...)``: awaited on a loop that is kept, or blocking."""
    if request.param == "sync":
        yield lambda name, *args, **kwargs: getattr(dcp_async.sync, name)(*args, **kwargs)
        return
    with asyncio.Runner() as runner:

        async def run(name: str, *args: Any, **kwargs: Any) -> Any:
            return await getattr(functional, name)(*args, **kwargs)

        yield lambda name, *args, **kwargs: runner.run(run(name, *args, **kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_every_keyword_of_stocks_is_taken(name: str) -> None:
    theirs = _checkpointer._Checkpointer if name == "Checkpointer" else getattr(stock, name)
    for module in (functional, dcp_async.sync):
        ours = inspect.signature(getattr(module, name)).parameters
        for keyword, parameter in inspect.signature(theirs).parameters.items():
            assert keyword in ours
            assert ours[keyword].kind is parameter.kind
            if keyword != "async_checkpointer_type":  # stock's has no "whatever is best"
                assert ours[keyword].default == parameter.default


def test_stock_loads_what_is_saved_and_the_metadata_is_what_stock_finds(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    state, path = state_of(), tmp_path / "a" / "latest"
    metadata = call("save", state, checkpoint_id=path)
    found = stock.FileSystemReader(path).read_metadata()
    assert isinstance(metadata, stock.Metadata)
    assert metadata.state_dict_metadata.keys() == found.state_dict_metadata.keys()
    target = {"model": blank(state["model"]), "optim": blank(state["optim"])}
    stock.load(target, checkpoint_id=path, no_dist=True)
    assert_same(target, {"model": state["model"], "optim": state["optim"]})


def test_what_stock_saved_is_loaded(call: Callable[..., Any], tmp_path: Path) -> None:
    state = state_of()
    stock.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    target = {"model": blank(state["model"]), "optim": blank(state["optim"])}
    call("load", target, checkpoint_id=str(tmp_path / "stock"))
    assert_same(target, {"model": state["model"], "optim": state["optim"]})


def test_everything_comes_back_with_its_keys(call: Callable[..., Any], tmp_path: Path) -> None:
    state = state_of()
    call("save", state, checkpoint_id=tmp_path / "c")
    target = blank(state)
    call("load", target, checkpoint_id=tmp_path / "c")
    assert_same(target, state)


def test_a_model_and_an_optimizer_go_on_as_they_would_have(call: Callable[..., Any], tmp_path: Path) -> None:
    model, optimizer = trained(0)
    model_state, optim_state = get_state_dict(model, optimizer)
    call("save", {"model": model_state, "optim": optim_state}, checkpoint_id=tmp_path / "c")
    other, other_optimizer = trained(1)
    model_state, optim_state = get_state_dict(other, other_optimizer)
    call("load", {"model": model_state, "optim": optim_state}, checkpoint_id=tmp_path / "c")
    set_state_dict(other, other_optimizer, model_state_dict=model_state, optim_state_dict=optim_state)
    assert_same(other.state_dict(), model.state_dict())
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())


def test_more_than_was_asked_for_is_ignored_less_is_an_error_and_nothing_is_touched(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    state = state_of()
    call("save", state, checkpoint_id=tmp_path / "c")
    part: dict[str, Any] = {"model": {"0.weight": torch.zeros(8, 4, dtype=torch.float64)}}
    call("load", part, checkpoint_id=tmp_path / "c")
    assert torch.equal(part["model"]["0.weight"], state["model"]["0.weight"].double())
    refused: list[tuple[dict[str, dict[str, torch.Tensor]], str]] = [
        ({"model": {"0.weight": torch.zeros(8, 4), "absent": torch.zeros(1)}}, "absent"),
        ({"model": {"0.weight": torch.zeros(8, 4), "0.bias": torch.zeros(3)}}, r"0\.bias"),
    ]
    for target, what in refused:
        with pytest.raises(IncompatibleStateError, match=rf"{what}.*allow_partial_load"):
            call("load", target, checkpoint_id=tmp_path / "c")
        assert not target["model"]["0.weight"].any()
    whole = {"0.weight": torch.zeros(8, 4), "absent": torch.ones(1)}
    planner = stock.DefaultLoadPlanner(allow_partial_load=True)
    call("load", {"model": whole}, checkpoint_id=tmp_path / "c", planner=planner)
    assert torch.equal(whole["0.weight"], state["model"]["0.weight"])
    assert torch.equal(whole["absent"], torch.ones(1))


@pytest.mark.parametrize("writer", [stock.FileSystemWriter, interop.FileSystemWriter], ids=["stock", "ours"])
@pytest.mark.parametrize("reader", [stock.FileSystemReader, interop.FileSystemReader], ids=["stock", "ours"])
def test_writers_and_readers_say_where(
    call: Callable[..., Any], writer: Any, reader: Any, tmp_path: Path
) -> None:
    state = state_of()
    call("save", state, storage_writer=writer(tmp_path / "c", thread_count=3))
    target = blank(state)
    call("load", target, storage_reader=reader(tmp_path / "c"))
    assert_same(target, state)
    with pytest.raises(SaveError, match="exists"):
        call("save", state, storage_writer=writer(tmp_path / "c", overwrite=False))
    # as with stock, the id counts where both are given
    call("save", state, checkpoint_id=tmp_path / "d", storage_writer=writer(tmp_path / "c", overwrite=False))
    assert sorted(committed(tmp_path)) == ["c", "d"]


def test_two_async_saves_that_share_a_writer_land_in_order(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = stock.FileSystemWriter(tmp_path / "c")
    responses = [
        call("async_save", {"w": torch.full((1 << 16,), float(n)), "n": n}, storage_writer=writer)
        for n in range(3)
    ]
    target: dict[str, Any] = {"w": torch.zeros(1 << 16), "n": -1}
    call("load", target, checkpoint_id=tmp_path / "c")  # waits for what is under way
    assert target["n"] == 2
    assert torch.equal(target["w"], torch.full((1 << 16,), 2.0))
    assert all(isinstance(r.upload_completion.future, concurrent.futures.Future) for r in responses)
    assert [r.upload_completion.future.result(30).checkpoint_id for r in responses] == ["c"] * 3
    assert leftovers(tmp_path) == []


def test_the_state_may_change_once_async_save_has_returned(call: Callable[..., Any], tmp_path: Path) -> None:
    tensor = torch.ones(1 << 20)
    response = call("async_save", {"t": tensor}, checkpoint_id=tmp_path / "c")
    tensor.zero_()
    response.upload_completion.result(60)
    target = {"t": torch.zeros(1 << 20)}
    call("load", target, checkpoint_id=tmp_path / "c")
    assert target["t"].all()


def test_a_failed_overwrite_keeps_what_was_there_and_its_handle_has_the_error(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call("save", {"n": 1}, checkpoint_id=tmp_path / "c")

    async def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "the disk is full")

    monkeypatch.setattr(LocalTransaction, "seal", fails)
    response = call("async_save", {"n": 2}, checkpoint_id=tmp_path / "c")
    future = response.upload_completion.future
    assert isinstance(future.exception(60), SaveError)
    with pytest.raises(SaveError, match="the disk is full"):
        future.result()
    with pytest.raises(SaveError, match="the disk is full"):
        call("save", {"n": 3}, checkpoint_id=tmp_path / "c")
    monkeypatch.undo()
    target = {"n": 0}
    call("load", target, checkpoint_id=tmp_path / "c")
    assert target == {"n": 1}


def test_a_load_that_fails_half_way_says_so(call: Callable[..., Any], tmp_path: Path) -> None:
    call("save", {"a": torch.ones(1 << 16), "b": torch.ones(1 << 16)}, checkpoint_id=tmp_path / "c")
    (file,) = (tmp_path / "c").glob("*.distcp")
    flip(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError) as caught:
        call("load", {"a": torch.zeros(1 << 16), "b": torch.zeros(1 << 16)}, checkpoint_id=tmp_path / "c")
    assert getattr(caught.value, "partially_loaded", False)


def test_futures_of_a_state_are_waited_for(call: Callable[..., Any], tmp_path: Path) -> None:
    made: concurrent.futures.Future[Any] = concurrent.futures.Future()
    threading.Thread(target=lambda: made.set_result({"n": 5})).start()
    call("async_save", made, checkpoint_id=tmp_path / "c").upload_completion.result(60)
    theirs: torch.futures.Future[Any] = torch.futures.Future()
    theirs.set_result({"n": 6})
    call("async_save", theirs, checkpoint_id=tmp_path / "d").upload_completion.result(60)
    for name, number in (("c", 5), ("d", 6)):
        target = {"n": 0}
        call("load", target, checkpoint_id=tmp_path / name)
        assert target["n"] == number
    failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
    failed.set_exception(RuntimeError("staging broke"))
    with pytest.raises(SaveError, match="could not be staged: RuntimeError: staging broke"):
        call("async_save", failed, checkpoint_id=tmp_path / "e")
    assert sorted(committed(tmp_path)) == ["c", "d"]


class Plain:
    """A stager with no method but the one that counts."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: dict[str, Any] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.seen = state_dict
        if self.error is not None:
            raise self.error
        return dict(state_dict)


def test_a_stager_is_given_what_statefuls_give_and_may_fail(call: Callable[..., Any], tmp_path: Path) -> None:
    stager = Plain()
    response = call("async_save", {"m": nn.Linear(2, 2)}, checkpoint_id=tmp_path / "c", async_stager=stager)
    response.upload_completion.result(60)
    assert set(stager.seen["m"]) == {"weight", "bias"}
    with pytest.raises(SaveError, match="could not be staged: MemoryError: no room"):
        call("async_save", {"n": 1}, checkpoint_id=tmp_path / "d", async_stager=Plain(MemoryError("no room")))
    assert committed(tmp_path) == ["c"]


def test_a_directory_is_reached_through_links(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    metadata = call("save", {"n": 1}, checkpoint_id=tmp_path / "link")
    assert metadata.storage_meta.checkpoint_id == str(tmp_path / "real")
    target = {"n": 0}
    call("load", target, checkpoint_id=tmp_path / "link")
    assert target["n"] == 1
    assert (tmp_path / "real" / ".metadata").exists()


def test_a_reader_brings_its_trust(call: Callable[..., Any], tmp_path: Path) -> None:
    trust = Trust(safe_globals=(Unknown,))
    call("save", {"u": Unknown()}, checkpoint_id=tmp_path / "c", trust=trust)
    target: dict[str, Any] = {"u": None}
    call("load", target, storage_reader=interop.FileSystemReader(tmp_path / "c", trust=trust))
    assert isinstance(target["u"], Unknown)


def test_a_script_goes_on_with_stocks_other_names(tmp_path: Path) -> None:
    for module in (dcp_async.sync, functional):
        assert module.FileSystemWriter is stock.FileSystemWriter
        assert module.state_dict.get_state_dict is get_state_dict
        assert all(hasattr(module, name) for name in dir(stock) if not name.startswith("_"))
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing
    dcp = dcp_async.sync
    dcp.save({"n": 1}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    assert committed(tmp_path) == ["c"]


async def test_an_awaitable_of_a_state_is_awaited(tmp_path: Path) -> None:
    async def staged() -> dict[str, Any]:
        return {"n": 5}

    response = await functional.async_save(staged(), checkpoint_id=tmp_path / "c")
    await response.upload_completion
    assert committed(tmp_path) == ["c"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_stager_of_torchs_stages(call: Callable[..., Any], in_background: bool, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.staging import StagingOptions

    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=in_background,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)
    try:
        tensor = torch.ones(1000)
        response = call("async_save", {"t": tensor}, checkpoint_id=tmp_path / "c", async_stager=stager)
        tensor.zero_()
        response.upload_completion.result(60)
    finally:
        stager.close()
    target = {"t": torch.zeros(1000)}
    call("load", target, checkpoint_id=tmp_path / "c")
    assert target["t"].all()


def test_deprecated_names_say_so_and_work(call: Callable[..., Any], tmp_path: Path) -> None:
    state = state_of()
    with pytest.warns(DeprecationWarning, match="use save"):
        call("save_state_dict", state, stock.FileSystemWriter(tmp_path / "c"), no_dist=True)
    target = blank(state)
    with pytest.warns(DeprecationWarning, match="use load"):
        call("load_state_dict", target, stock.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert_same(target, state)


def test_what_has_no_meaning_here_says_so(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="use_collectives=False: no collective"):
        call("save", {"n": 1}, checkpoint_id=tmp_path / "c", use_collectives=False)
    with pytest.warns(UserWarning, match="async_checkpointer_type=PROCESS"):
        response = call(
            "async_save",
            {"n": 1},
            checkpoint_id=tmp_path / "c",
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        )
    response.upload_completion.result(60)
    with warnings.catch_warnings(action="error"):
        kind = AsyncCheckpointerType.THREAD
        call(
            "async_save", {"n": 1}, checkpoint_id=tmp_path / "c", async_checkpointer_type=kind
        ).upload_completion.result(60)


def test_bad_arguments_are_refused_before_anything_is_written(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    there = tmp_path / "c"
    for error, match, arguments in (
        (ValueError, "nothing says where the checkpoint is", {}),
        (TypeError, "is the path or URL", {"checkpoint_id": 5}),
        (ValueError, "no storage serves ftp://", {"checkpoint_id": "ftp://host/step-1"}),
        (ValueError, "names a whole root", {"checkpoint_id": "memory://run"}),
        (ValueError, "names no directory", {"checkpoint_id": ""}),
        (TypeError, "is no StorageWriter", {"storage_writer": "c"}),
        (TypeError, "pass an instance", {"checkpoint_id": there, "planner": stock.DefaultSavePlanner}),
        (TypeError, "unexpected keyword", {"checkpoint_id": there, "thread_count": 3}),
    ):
        with pytest.raises(error, match=match):
            call("save", {"n": 1}, **arguments)
    with pytest.raises(TypeError, match="is no AsyncStager"):
        call("async_save", {"n": 1}, checkpoint_id=there, async_stager=5)
    with pytest.raises(TypeError, match="is no StorageReader"):
        call("load", {"n": 1}, storage_reader=stock.FileSystemWriter(there))
    with pytest.raises(CheckpointNotFoundError, match="not that of a run"):
        call("load", {"n": 1}, checkpoint_id=tmp_path)
    assert committed(tmp_path) == []


class Unknown:
    pass


def test_trust_is_the_callers(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="safe_globals"):
        call("save", {"u": Unknown()}, checkpoint_id=tmp_path / "c")
    trust = Trust(safe_globals=(Unknown,))
    call("save", {"u": Unknown()}, checkpoint_id=tmp_path / "c", trust=trust)
    target: dict[str, Any] = {"u": None}
    call("load", target, checkpoint_id=tmp_path / "c", trust=trust)
    assert isinstance(target["u"], Unknown)


def test_urls_are_served(call: Callable[..., Any], tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/c", "memory://functional/c"):
        call("save", {"n": 4}, checkpoint_id=url)
        target = {"n": 0}
        call("load", target, checkpoint_id=url)
        assert target["n"] == 4


async def test_saves_of_one_directory_that_are_called_at_once_land_in_order(tmp_path: Path) -> None:
    directory = tmp_path / "latest"
    calls = [
        functional.async_save({"w": torch.full((1 << 18,), float(number))}, checkpoint_id=directory)
        for number in range(6)
    ]
    for response in await asyncio.gather(*calls):
        await response.upload_completion
    loaded = {"w": torch.zeros(1 << 18)}
    await functional.load(loaded, checkpoint_id=directory)
    assert set(loaded["w"].tolist()) == {5.0}


async def test_a_save_that_is_given_up_while_it_waits_lets_no_later_one_pass(tmp_path: Path) -> None:
    directory, state = tmp_path / "latest", {"w": torch.zeros(1 << 18)}
    first = asyncio.ensure_future(functional.save(state, checkpoint_id=directory))
    await asyncio.sleep(0)
    second = asyncio.ensure_future(functional.save({"w": torch.ones(2)}, checkpoint_id=directory))
    await asyncio.sleep(0)
    third = asyncio.ensure_future(functional.save({"w": torch.ones(3)}, checkpoint_id=directory))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(first, third)
    assert first.done()
    loaded = {"w": torch.zeros(3)}
    await functional.load(loaded, checkpoint_id=directory)
    assert loaded["w"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("writer", ["ours", "stock"])
@pytest.mark.parametrize("looks", [False, True])
def test_a_process_whose_failed_save_nobody_looked_at_does_not_end_well(
    looks: bool, writer: str, tmp_path: Path
) -> None:
    script = f"""
import resource, torch
import dcp_async.sync as dcp
from torch.distributed.checkpoint import FileSystemWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # as on a full disk
writer = FileSystemWriter({str(tmp_path / "a")!r}) if {writer == "stock"} else None
state = {{"w": torch.ones(1 << 18)}}
response = dcp.async_save(state, checkpoint_id={str(tmp_path / "a")!r}, storage_writer=writer)
if {looks}:
    print(type(response.upload_completion.future.exception()).__name__)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout == ("SaveError\n" if looks else ""), ended.stderr
    assert ended.returncode == (0 if looks else 1), ended.stderr
    assert ("nobody looked at its handles" in ended.stderr) is not looks


async def test_a_checkpointer_serves_many_calls_and_is_closed_once(tmp_path: Path) -> None:
    writer, reader = stock.FileSystemWriter(tmp_path / "c"), stock.FileSystemReader(tmp_path / "c")
    async with functional.Checkpointer(writer, reader) as checkpointer:
        assert str(tmp_path / "c") in repr(checkpointer)
        for number in range(3):
            metadata = await checkpointer.save({"n": number})
            assert list(metadata.state_dict_metadata) == ["n"]
            response = await checkpointer.async_save({"n": 10 + number})
            target = {"n": 0}
            await checkpointer.load(target)
            assert target["n"] == 10 + number
            assert response.upload_completion.done()
    await checkpointer.close()
    with pytest.raises(EngineStateError, match="closed"):
        await checkpointer.save({"n": 1})


async def test_first_calls_of_a_checkpointer_that_come_at_once_open_one_engine(tmp_path: Path) -> None:
    writer, reader = stock.FileSystemWriter(tmp_path / "c"), stock.FileSystemReader(tmp_path / "c")
    before = set(threading.enumerate())
    async with functional.Checkpointer(writer, reader) as checkpointer:
        await asyncio.gather(*(checkpointer.save({"n": number}) for number in range(3)))
        engines = [t for t in set(threading.enumerate()) - before if t.name == "dcp_async-engine"]
        assert len(engines) == 1
    engines[0].join(30)
    assert not engines[0].is_alive()


def test_the_blocking_checkpointer(tmp_path: Path) -> None:
    writer, reader = interop.FileSystemWriter(tmp_path / "c"), interop.FileSystemReader(tmp_path / "c")
    with dcp_async.sync.Checkpointer(writer, reader, no_dist=True) as checkpointer:
        checkpointer.save({"n": 1})
        checkpointer.async_save({"n": 2})
        target = {"n": 0}
        checkpointer.load(target)
        assert target["n"] == 2
    with pytest.raises(EngineStateError, match="closed"):
        checkpointer.load(target)
