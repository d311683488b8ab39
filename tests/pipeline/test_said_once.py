"""What a call raises is not logged besides: by the engine, its blocking twin, or asyncio."""

from __future__ import annotations

import gc
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    IncompatibleStateError,
    Limits,
    SaveError,
    StagingOptions,
    StorageError,
    sync,
)
from dcp_async.engine import release
from tests.support.doubles import KIB, FaultyStorage, data_files, flip, on_thread, random_tensor

pytestmark = pytest.mark.usefixtures("both_loops")

STATE = {"w": random_tensor(torch.float32, (100, 100), 1), "n": 1}
WIDE = {"w": random_tensor(torch.uint8, (20 * 64 * KIB,), 2)}
SMALL = StagingOptions(part_bytes=64 * KIB, budget_bytes=4 * 64 * KIB)
"""So small that WIDE is not staged before some of it is written."""
OVERLAP = StagingOptions(overlap=True)

Call = Callable[..., Awaitable[Any]]
"""A verb of the engine by its name, with its arguments."""


async def by_the_engine(root: Any, calls: Callable[[Call], Awaitable[None]], **options: Any) -> None:
    async with CheckpointEngine(root, **options) as engine:
        await calls(lambda verb, *args, **options: getattr(engine, verb)(*args, **options))


async def by_its_twin(root: Any, calls: Callable[[Call], Awaitable[None]], **options: Any) -> None:
    engine = sync.CheckpointEngine(root, **options)

    async def call(verb: str, *args: Any, **options: Any) -> Any:
        return await on_thread(lambda: getattr(engine, verb)(*args, **options))

    await on_thread(engine.open)
    try:
        await calls(call)
    finally:
        await on_thread(engine.close)


both = pytest.mark.parametrize("run", [by_the_engine, by_its_twin])
Run = Callable[..., Awaitable[None]]


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings and worse, asyncio's about tasks that nobody waited for among them."""
    gc.collect()
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@both
async def test_a_name_that_is_taken(root: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def calls(call: Call) -> None:
        await (await call("save", STATE, step=1)).upload_completion
        with pytest.raises(CheckpointExistsError):
            await call("save", STATE, step=1)

    await run(root, calls)
    assert logged(caplog) == []


@both
async def test_a_name_that_is_being_saved(
    faulty: FaultyStorage, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        with faulty.hold("commit"):
            response = await call("save", STATE, step=1)
            with pytest.raises(CheckpointExistsError):
                await call("save", STATE, step=1)
        await response.upload_completion

    await run(faulty, calls, limits=Limits(pending_saves=2))
    assert logged(caplog) == []


@both
@pytest.mark.parametrize("verb", ["begin", "put"])
async def test_a_storage_that_fails_while_save_waits(
    faulty: FaultyStorage, run: Run, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        faulty.fail(verb, OSError(28, "No space left on device"))
        with pytest.raises(SaveError):
            await call("save", WIDE, step=1)

    await run(faulty, calls, staging=SMALL)
    assert logged(caplog) == []


@both
async def test_a_state_that_can_not_be_captured(
    root: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        with pytest.raises(SaveError):
            await call("save", {"f": lambda: None}, step=1)

    await run(root, calls)
    assert logged(caplog) == []


@both
@pytest.mark.parametrize("source", ["latest", 1])
async def test_the_only_checkpoint_is_corrupt(
    root: Path, run: Run, source: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        await (await call("save", STATE, step=1)).upload_completion
        flip(data_files(root / "step-00000001")[0], 4096)
        with pytest.raises(CorruptCheckpointError):
            await call("load", dict(STATE), source)
        with pytest.raises(CorruptCheckpointError):
            await call("read", source)

    await run(root, calls)
    assert logged(caplog) == []


@both
async def test_what_is_asked_for_is_not_there(root: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def calls(call: Call) -> None:
        with pytest.raises(CheckpointNotFoundError):
            await call("load", dict(STATE))
        await (await call("save", STATE, step=1)).upload_completion
        with pytest.raises(CheckpointNotFoundError):
            await call("read", "best")
        with pytest.raises(IncompatibleStateError):
            await call("load", {**STATE, "more": torch.ones(3)})

    await run(root, calls)
    assert logged(caplog) == []


@both
async def test_a_root_that_can_not_be_one(root: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    root.write_bytes(b"")

    async def calls(call: Call) -> None:
        raise AssertionError("it opened")

    with pytest.raises(StorageError):
        await run(root, calls)
    assert logged(caplog) == []


@both
async def test_a_torch_that_does_not_read_back(
    root: Path, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ValueError("reads as something else")

    async def calls(call: Call) -> None:
        raise AssertionError("it opened")

    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setattr(release, "prove_small_state", broken)
    with pytest.raises(EngineStateError, match=r"2\.99\.0"):
        await run(root, calls)
    assert logged(caplog) == []


# --- what nobody raises is said


@both
async def test_a_failure_after_save_has_returned_is_logged(
    faulty: FaultyStorage, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        faulty.fail("begin", OSError(28, "No space left on device"))
        response = await call("save", STATE, step=1)
        with pytest.raises(SaveError):
            await response.upload_completion
        assert len(logged(caplog)) == 1

    await run(faulty, calls, staging=OVERLAP)


@both
async def test_a_corrupt_checkpoint_that_is_passed_over_is_logged(
    root: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def calls(call: Call) -> None:
        for step in (1, 2):
            await (await call("save", STATE, step=step)).upload_completion
        flip(data_files(root / "step-00000002")[0], 4096)
        assert (await call("load", dict(STATE))).step == 1
        (said,) = logged(caplog)
        assert "step-00000002" in said
        assert "older" in said

    await run(root, calls)
