"""Writers, readers and stagers of anybody's plug in: called as stock calls them, with an engine's handles."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as stock
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

import dcp_async.sync
from dcp_async import (
    CheckpointNotFoundError,
    LoadError,
    SaveCancelled,
    SaveError,
    functional,
    open_checkpoint,
)
from tests.support.doubles import assert_same
from tests.support.planners import RecordingLoad, RecordingSave

# stock's writer warns of what is overwritten, whatever it was told
pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")


def make_state() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": nn.Linear(4, 8).state_dict(), "ema": [torch.ones(3), torch.zeros(2)], "epoch": 3}


def blank() -> dict[str, Any]:
    model = {"weight": torch.zeros(8, 4), "bias": torch.zeros(8)}
    return {"model": model, "ema": [torch.zeros(3), torch.ones(2)], "epoch": 0}


class Recorded:
    """Notes each call of a writer's or reader's, and the thread that it came from; fails at one of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.failing = ""
        self.error: BaseException = OSError(5, "the tape is torn")
        super().__init__(*args, **kwargs)

    def _note(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        if name == self.failing:
            raise self.error


PLANS = ("prepare_local_plan", "prepare_global_plan")
WRITES = ("reset", "set_up_storage_writer", *PLANS, "write_data", "finish")
READS = ("reset", "read_metadata", "set_up_storage_reader", *PLANS, "read_data")


class Writer(Recorded, FileSystemWriter):
    """Of stock's, recorded."""


class Reader(Recorded, FileSystemReader):
    """Of stock's, recorded."""


def _noted(kind: type, names: tuple[str, ...]) -> None:
    for name in names:

        def call(self: Any, *args: Any, _name: str = name, **kwargs: Any) -> Any:
            self._note(_name)
            base = FileSystemWriter if isinstance(self, FileSystemWriter) else FileSystemReader
            method = getattr(base, _name)
            return method(self, *args, **kwargs)

        # stock looks whether a part takes keywords
        setattr(kind, name, call)


_noted(Writer, WRITES)
_noted(Reader, READS)


@pytest.fixture(params=["async", "sync"])
def call(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    if request.param == "sync":
        yield lambda name, *args, **kwargs: getattr(dcp_async.sync, name)(*args, **kwargs)
        return
    with asyncio.Runner() as runner:

        async def run(name: str, *args: Any, **kwargs: Any) -> Any:
            return await getattr(functional, name)(*args, **kwargs)

        yield lambda name, *args, **kwargs: runner.run(run(name, *args, **kwargs))


def test_calls_come_in_stocks_order_from_one_thread(call: Callable[..., Any], tmp_path: Path) -> None:
    ours, theirs, planners = (
        Writer(tmp_path / "a"),
        Writer(tmp_path / "b"),
        (RecordingSave(), RecordingSave()),
    )
    metadata = call("save", make_state(), storage_writer=ours, planner=planners[0])
    found = stock.save(make_state(), storage_writer=theirs, planner=planners[1], no_dist=True)
    assert ours.calls == theirs.calls
    assert planners[0].calls == planners[1].calls
    assert len(ours.threads) == 1
    assert ours.threads != {threading.get_ident()}
    assert metadata.state_dict_metadata.keys() == found.state_dict_metadata.keys()
    reads, their_reads = Reader(tmp_path / "x"), Reader(tmp_path / "x")
    loads, target = (RecordingLoad(), RecordingLoad()), blank()
    call("load", target, storage_reader=reads, checkpoint_id=tmp_path / "a", planner=loads[0])
    stock.load(
        blank(), storage_reader=their_reads, checkpoint_id=tmp_path / "a", planner=loads[1], no_dist=True
    )
    assert reads.calls == their_reads.calls
    # what they are asked, but for the order in which a checkpoint names its items
    assert sorted(name for name, *_ in loads[0].calls) == sorted(name for name, *_ in loads[1].calls)
    assert len(reads.threads) == 1
    assert_same(target, make_state())


@pytest.mark.parametrize("failing", WRITES[1:])
def test_a_writer_that_raises_fails_the_save_and_its_handles(
    call: Callable[..., Any], failing: str, tmp_path: Path
) -> None:
    writer = Writer(tmp_path / "a")
    writer.failing = failing
    with pytest.raises(SaveError, match="the tape is torn") as caught:
        call("save", make_state(), storage_writer=writer)
    assert isinstance(caught.value.failures[0], OSError)
    # what derives from BaseException, as stock's own errors do, ends nothing
    writer.error = stock.CheckpointException("torn", {})
    response = call("async_save", make_state(), storage_writer=writer)
    assert isinstance(response.upload_completion.future.exception(60), SaveError)
    assert ("finish" in writer.calls) == (failing == "finish")
    writer.failing = ""
    call("save", make_state(), storage_writer=writer)  # nothing of the failures is left


@pytest.mark.parametrize("failing", READS)
def test_a_reader_that_raises_says_whether_targets_were_touched(
    call: Callable[..., Any], failing: str, tmp_path: Path
) -> None:
    call("save", make_state(), checkpoint_id=tmp_path / "a")
    reader, target = Reader(tmp_path / "a"), blank()
    reader.failing = failing
    touched = "may be partly overwritten" if failing == "read_data" else "nothing was loaded"
    with pytest.raises(LoadError, match=f"the tape is torn.*{touched}"):
        call("load", target, storage_reader=reader, checkpoint_id=tmp_path / "a")
    assert_same(target, blank())
    reader.failing = ""
    with pytest.raises(CheckpointNotFoundError):
        call("load", target, storage_reader=reader, checkpoint_id=tmp_path / "none")
    call("load", target, storage_reader=reader, checkpoint_id=tmp_path / "a")
    assert_same(target, make_state())


class Stager:
    """As torch's protocol has it."""

    should_synchronize_after_execute = True

    def __init__(self, error: Exception | None = None, *, in_background: bool = False) -> None:
        self.error, self.in_background, self.calls = error, in_background, [""]

    def stage(self, state_dict: Any) -> Any:
        self.calls.append("stage")
        copy = {"t": state_dict["t"].clone()}
        if self.in_background:
            made: concurrent.futures.Future[Any] = concurrent.futures.Future()
            if self.error is not None:
                made.set_exception(self.error)
            else:
                threading.Thread(target=lambda: made.set_result(copy)).start()
            return made
        if self.error is not None:
            raise self.error
        return copy

    def synchronize_staging(self) -> None:
        self.calls.append("synchronize")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("in_background", [False, True])
def test_stagers_stage_what_the_writer_writes(
    call: Callable[..., Any], in_background: bool, tmp_path: Path
) -> None:
    stager, tensor = Stager(in_background=in_background), torch.ones(1000)
    writer = Writer(tmp_path / "a")
    response = call("async_save", {"t": tensor}, storage_writer=writer, async_stager=stager)
    response.staging_completion.result(60)
    tensor.zero_()
    response.upload_completion.result(60)
    assert stager.calls == ["", "stage", *(["synchronize"] if not in_background else [])]
    target = {"t": torch.zeros(1000)}
    call("load", target, checkpoint_id=tmp_path / "a")
    assert target["t"].all()


def test_a_stager_that_fails_at_once_fails_the_save(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    with pytest.raises(SaveError, match=r"staging.*no room"):
        call(
            "async_save",
            {"t": torch.ones(3)},
            storage_writer=writer,
            async_stager=Stager(MemoryError("no room")),
        )
    assert writer.calls == []
    call("save", {"t": torch.ones(3)}, storage_writer=writer)


def test_a_stager_that_fails_later_fails_both_handles(call: Callable[..., Any], tmp_path: Path) -> None:
    stager, writer = Stager(MemoryError("no room"), in_background=True), Writer(tmp_path / "a")
    response = call("async_save", {"t": torch.ones(3)}, storage_writer=writer, async_stager=stager)
    for handle in (response.staging_completion, response.upload_completion):
        assert isinstance(handle.future.exception(60), SaveError)
        with pytest.raises(SaveError, match="no room"):
            handle.result()
    assert writer.calls == []


def test_without_a_stager_the_state_may_change_at_once(call: Callable[..., Any], tmp_path: Path) -> None:
    tensor = torch.ones(1 << 18)
    response = call("async_save", {"t": tensor}, storage_writer=Writer(tmp_path / "a"))
    tensor.zero_()
    response.upload_completion.result(60)
    target = {"t": torch.zeros(1 << 18)}
    call("load", target, checkpoint_id=tmp_path / "a")
    assert target["t"].all()


def test_saves_that_share_a_writer_take_turns(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a")
    responses = [call("async_save", {"n": number}, storage_writer=writer) for number in range(3)]
    for response in responses:
        response.upload_completion.result(60)
    assert writer.calls == 3 * list(WRITES[1:])
    target = {"n": -1}
    call("load", target, checkpoint_id=tmp_path / "a")
    assert target == {"n": 2}


class Waiting(Writer):
    """Holds its save in write_data."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.entered.set()
        assert self.go_on.wait(60)
        return super().write_data(plan, planner)


def test_a_cancelled_save_is_never_finished(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = Waiting(tmp_path / "a")
    response = call("async_save", {"n": 1}, storage_writer=writer)
    assert writer.entered.wait(60)
    response.cancel()
    writer.go_on.set()
    with pytest.raises(SaveCancelled):
        response.upload_completion.result(60)
    assert "finish" not in writer.calls
    assert not (tmp_path / "a" / ".metadata").exists()


def test_stream_extensions_go_both_ways(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "a", _extensions=[ZStandard()])
    call("save", make_state(), storage_writer=writer)
    theirs, ours = blank(), blank()
    stock.load(theirs, checkpoint_id=tmp_path / "a", no_dist=True)
    call("load", ours, checkpoint_id=tmp_path / "a")
    assert_same(theirs, make_state())
    assert_same(ours, make_state())


def test_a_file_for_each_item(call: Callable[..., Any], tmp_path: Path) -> None:
    writer = FileSystemWriter(tmp_path / "a", single_file_per_rank=False, thread_count=2)
    call("save", make_state(), storage_writer=writer)
    assert len(list((tmp_path / "a").glob("*.distcp"))) == 5
    target = blank()
    call("load", target, checkpoint_id=tmp_path / "a")
    assert_same(target, make_state())


def test_fsspec(call: Callable[..., Any], tmp_path: Path) -> None:
    path = f"memory://{tmp_path.name}/a"
    call("save", make_state(), storage_writer=FsspecWriter(path))
    target = blank()
    call("load", target, storage_reader=FsspecReader(path))
    assert_same(target, make_state())


def test_hugging_faces_files(call: Callable[..., Any], tmp_path: Path) -> None:
    weights = make_state()["model"]
    writer = HuggingFaceStorageWriter(
        path=str(tmp_path / "hf"), fqn_to_index_mapping=dict.fromkeys(weights, 1)
    )
    call("save", dict(weights), storage_writer=writer)
    target = blank()["model"]
    call("load", target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "hf")))
    assert_same(target, weights)
    with dcp_async.sync.open_checkpoint(tmp_path / "hf") as checkpoint:
        assert_same(checkpoint.read(), dict(weights))


class Counter:
    """A Stateful."""

    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number, "t": torch.full((2,), float(self.number))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.number = state_dict["number"]


def test_statefuls_are_asked_and_restored(call: Callable[..., Any], tmp_path: Path) -> None:
    call("save", {"counter": Counter(7), "n": 1}, storage_writer=Writer(tmp_path / "a"))
    counter = Counter(0)
    target = {"counter": counter, "n": 0}
    call("load", target, storage_reader=Reader(tmp_path / "a"))
    assert (counter.number, target["n"], target["counter"]) == (7, 1, counter)


def test_a_load_of_a_part(call: Callable[..., Any], tmp_path: Path) -> None:
    call("save", make_state(), storage_writer=Writer(tmp_path / "a"))
    with pytest.raises(LoadError, match=r"absent.*nothing was loaded"):
        call("load", {"absent": torch.zeros(1)}, storage_reader=Reader(tmp_path / "a"))
    target = {"absent": torch.ones(1), "epoch": 0}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    call("load", target, storage_reader=Reader(tmp_path / "a"), planner=planner)
    assert target == {"absent": torch.ones(1), "epoch": 3}


async def test_a_checkpointer_with_parts_of_ones_own(tmp_path: Path) -> None:
    writer, reader, target = Writer(tmp_path / "a"), Reader(tmp_path / "a"), blank()
    async with functional.Checkpointer(writer, reader) as checkpointer:
        await checkpointer.save(make_state())
        await (await checkpointer.async_save(make_state())).upload_completion
        await checkpointer.load(target)
    assert_same(target, make_state())
    with dcp_async.sync.Checkpointer(writer, reader) as blocking:  # while a loop runs in this thread
        blocking.save(make_state())
        blocking.load(blank())
    async with open_checkpoint(tmp_path / "a") as checkpoint:
        assert checkpoint.info.producer == "stock"


def test_parts_that_are_none_are_refused(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="StorageWriter"):
        call("save", make_state(), storage_writer=Reader(tmp_path / "a"))
    with pytest.raises(TypeError, match="AsyncStager"):
        call("async_save", make_state(), storage_writer=Writer(tmp_path / "a"), async_stager=3)
    with pytest.raises(TypeError, match="planner"):
        call("save", make_state(), storage_writer=Writer(tmp_path / "a"), planner=DefaultLoadPlanner())
