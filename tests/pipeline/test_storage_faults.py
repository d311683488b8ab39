"""A storage that fails at any verb: the save fails, nothing is committed, the next one works."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    CheckpointInfo,
    LoadError,
    SaveError,
    StagingOptions,
    StorageError,
)
from tests.support.doubles import (
    PATIENCE,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    chain,
    committed,
    random_tensor,
)
from tests.support.saves import PART, SMALL, SMALL_OVERLAP

WIDE: dict[str, Any] = {"w": random_tensor(torch.uint8, (20 * PART,), 2), "n": [1, {"x": torch.ones(3)}]}

ERRORS: dict[str, Callable[[], Exception]] = {
    "no_space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "io": lambda: OSError(errno.EIO, "Input/output error"),
    "storage": lambda: StorageError("the store said no", verb="put", path="somewhere"),
    "odd": lambda: RuntimeError("a bug in a third party's storage"),
}
PLACES = [("begin", 1), ("put", 1), ("put", 3), ("put", 15), ("seal", 1), ("commit", 1)]
PHASES = {
    "begin": ("plan", "stage", "write"),
    "put": ("stage", "write"),
    "seal": ("write",),
    "commit": ("commit",),
}


async def outcome(engine: CheckpointEngine, **options: Any) -> CheckpointInfo:
    response = await engine.save(WIDE, **options)
    return await asyncio.wait_for(_result(response.upload_completion), PATIENCE)


async def _result(handle: Any) -> Any:
    return await handle


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize(
    "staging", [SMALL, SMALL_OVERLAP, StagingOptions()], ids=["small", "overlap", "default"]
)
@pytest.mark.parametrize(("verb", "nth"), PLACES)
async def test_a_fault_fails_the_save_and_the_next_one_works(
    root: Path, faulty: FaultyStorage, verb: str, nth: int, staging: StagingOptions
) -> None:
    async with CheckpointEngine(faulty, staging=staging) as engine:
        await outcome(engine, step=1)
        cause = OSError(errno.ENOSPC, "No space left on device")
        if nth > 1 and staging.part_bytes != PART:
            nth = 1  # the whole state is one part there
        faulty.fail(verb, cause, nth=nth)
        with pytest.raises(SaveError) as caught:
            await outcome(engine, step=2)
        error = caught.value
        assert (error.checkpoint_id, error.step) == ("step-00000002", 2)
        assert error.phase in PHASES[verb]
        assert any(link is cause for link in chain(error))
        assert set(error.failures) == {0}
        assert error.__cause__ is error.failures[0]
        assert "step-00000002" in str(error)
        assert "space" in str(error)
        assert committed(root) == ["step-00000001"]
        await engine.wait()
        faulty.heal()
        await outcome(engine, step=3)
        assert_same(await engine.read(), WIDE)
        assert_same(await engine.read(1), WIDE)
    assert_holds_only(root, ["step-00000001", "step-00000003"])


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("verb", ["begin", "put", "seal", "commit"])
async def test_any_kind_of_error_becomes_one_of_the_tree(
    root: Path, faulty: FaultyStorage, verb: str, kind: str
) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        cause = ERRORS[kind]()
        faulty.fail(verb, cause)
        with pytest.raises(SaveError) as caught:
            await outcome(engine, step=2)
        assert any(link is cause for link in chain(caught.value))
        faulty.heal()
        await outcome(engine, step=3)
    assert_holds_only(root, ["step-00000003"])


@pytest.mark.parametrize("verb", ["begin", "put", "seal", "commit"])
async def test_a_fault_in_the_abort_that_follows_does_not_hide_the_first(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        cause = OSError(errno.EIO, "the first trouble")
        faulty.fail(verb, cause)
        faulty.fail("abort", OSError(errno.EIO, "and more"))
        with pytest.raises(SaveError) as caught:
            await outcome(engine, step=2)
        assert any(link is cause for link in chain(caught.value))
        faulty.heal()
        await outcome(engine, step=3)
        assert_same(await engine.read(), WIDE)
    assert_holds_only(root, ["step-00000003"])


async def test_a_fault_in_the_sweep_does_not_lose_the_save(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("sweep", OSError(errno.EACCES, "not yours"))
        await outcome(engine, step=1)
        assert_same(await engine.read(), WIDE)


async def test_a_fault_after_the_commit_does_not_unsay_it(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("abort", OSError(errno.EIO, "while releasing"))
        try:
            await outcome(engine, step=1)
        except SaveError:
            assert committed(root) == []
        else:
            assert_same(await engine.read(1), WIDE)


@pytest.mark.usefixtures("both_loops")
async def test_a_transient_fault_at_each_put_in_turn(root: Path, faulty: FaultyStorage) -> None:
    """Also a test of the pool: a buffer lost to each failure would starve the budget of four parts."""
    failures = 0
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        for nth in range(1, 100):
            faulty.fail("put", OSError(errno.EIO, "broken"), nth=nth, times=1)
            try:
                await outcome(engine, step=nth)
            except SaveError:
                failures += 1
            else:
                break
            finally:
                faulty.heal()
        assert failures >= 20
        await outcome(engine, step=1000)
        assert_same(await engine.read(1000), WIDE)
    assert_holds_only(root, [f"step-{failures + 1:08d}", "step-00001000"])


async def test_two_saves_in_flight_fail_apart(root: Path, faulty: FaultyStorage) -> None:
    from dcp_async import Limits

    async with CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("seal", times=2) as gate:
            faulty.fail("seal", OSError("the first one only"), nth=1, times=1)
            first = await engine.save(WIDE, step=1)
            await gate.until_arrived()
            second = await engine.save(WIDE, step=2)
        results = [await _settled(first.upload_completion), await _settled(second.upload_completion)]
        assert sorted(isinstance(result, SaveError) for result in results) == [False, True]
        await outcome(engine, step=3)
    assert len(committed(root)) == 2


async def _settled(handle: Any) -> Any:
    try:
        return await handle
    except Exception as error:
        return error


# --- reading --------------------------------------------------------------------------------------


READ_VERBS = ["list", "open", "metadata", "manifest", "size", "read_into"]


def broken(verb: str) -> StorageError:
    return StorageError("the disk does not answer", verb=verb, path="somewhere")


def blank_target() -> dict[str, Any]:
    return {"w": torch.zeros_like(WIDE["w"]), "n": [0, {"x": torch.zeros(3)}]}


@pytest.mark.parametrize("verb", READ_VERBS)
async def test_a_fault_while_loading_is_of_the_tree(root: Path, faulty: FaultyStorage, verb: str) -> None:
    target = blank_target()
    async with CheckpointEngine(faulty, staging=SMALL) as engine:
        await outcome(engine, step=1)
        cause = broken(verb)
        faulty.fail(verb, cause)
        with pytest.raises((LoadError, StorageError)) as caught:
            await engine.load(target)
        assert any(link is cause for link in chain(caught.value))
        with pytest.raises((LoadError, StorageError)):
            await engine.read()
        faulty.heal()
        await engine.load(target)
        assert_same(target, WIDE)


@pytest.mark.parametrize("verb", READ_VERBS)
async def test_a_fault_of_the_medium_is_no_fallback(root: Path, faulty: FaultyStorage, verb: str) -> None:
    """Corrupt bytes are; a disk that is away for a moment must not cost a run its newest checkpoint."""
    async with CheckpointEngine(faulty, staging=SMALL) as engine:
        await outcome(engine, step=1)
        await outcome(engine, step=2)
        faulty.fail(verb, broken(verb), times=1)
        try:
            report = await engine.load(blank_target())
        except StorageError:
            return
        assert report.step == 2


@pytest.mark.parametrize("verb", READ_VERBS)
async def test_a_third_partys_own_error_while_loading_becomes_one_of_the_tree(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async with CheckpointEngine(faulty, staging=SMALL) as engine:
        await outcome(engine, step=1)
        cause = OSError(errno.EIO, "Input/output error")
        faulty.fail(verb, cause)
        with pytest.raises(CheckpointError) as caught:
            await engine.load(blank_target())
        assert any(link is cause for link in chain(caught.value))


async def test_a_fault_while_opening_is_an_error_of_the_tree_and_leaves_no_engine(
    root: Path, faulty: FaultyStorage
) -> None:
    for verb in ("connect", "list"):
        faulty.fail(verb, broken(verb))
        engine = CheckpointEngine(faulty)
        with pytest.raises(CheckpointError):
            await engine.open()
        await engine.close()
        faulty.heal()
    async with CheckpointEngine(faulty) as engine:
        await outcome(engine)


async def test_messages_say_what_to_do(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("put", OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(SaveError) as caught:
            await outcome(engine, step=2)
    assert re.search("step-00000002", str(caught.value))
    assert len(str(caught.value)) > 40
