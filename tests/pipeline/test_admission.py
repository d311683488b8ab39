"""Which saves are let in, what they are called, and who wins a name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import (
    CheckpointEngine,
    CheckpointError,
    CheckpointExistsError,
    CheckpointInfo,
    Limits,
    SaveError,
    Stager,
    StagingOptions,
)
from tests.support.doubles import (
    ASIDE_BYTES,
    PATIENCE,
    EventLog,
    FaultyStorage,
    assert_holds_only,
    assert_same,
    committed,
    faulty_storage,
    leftovers,
    mapped_arena_bytes,
    random_tensor,
)
from tests.support.saves import PART, SMALL, STATE


async def saved(engine: CheckpointEngine, **options: Any) -> CheckpointInfo:
    response = await engine.save(options.pop("state", STATE), **options)
    return await response.upload_completion


# --- pending_saves --------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_loops")
async def test_a_full_engine_waits_for_the_oldest_upload(root: Path, faulty: FaultyStorage) -> None:
    log = EventLog()
    async with CheckpointEngine(faulty, observer=log) as engine:
        with faulty.hold("put") as gate:
            first = await engine.save(STATE, step=1)
            await gate.until_arrived()
            second = asyncio.ensure_future(engine.save(STATE, step=2))
            await asyncio.sleep(0)
            assert engine.pending == (first,)
            assert not second.done()
        await (await second).upload_completion
    order = log.order()
    assert order.index(("SaveCommitted", "step-00000001")) < order.index(("SaveStaged", "step-00000002"))


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize(
    "staging", [StagingOptions(), StagingOptions(overlap=True)], ids=["staged", "overlap"]
)
async def test_pending_saves_admits_that_many(
    root: Path, faulty: FaultyStorage, staging: StagingOptions
) -> None:
    async with CheckpointEngine(faulty, staging=staging, limits=Limits(pending_saves=3)) as engine:
        with faulty.hold("put") as gate:
            responses = tuple([await engine.save(STATE | {"n": n}, step=n) for n in range(3)])
            await gate.until_arrived()
            assert engine.pending == responses
            assert not any(response.upload_completion.done() for response in responses)
        for response in responses:
            await response.upload_completion
        assert engine.pending == ()
        for n in range(3):
            assert_same(await engine.read(n), STATE | {"n": n})


async def test_a_failed_save_makes_room(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        faulty.fail("put", OSError("broken"))
        with pytest.raises(SaveError):
            await saved(engine, step=1)
        faulty.heal()
        assert (await saved(engine, step=2)).step == 2


async def test_latest_never_goes_backwards_with_saves_in_flight(root: Path) -> None:
    seen: list[int] = []
    async with CheckpointEngine(root, limits=Limits(pending_saves=4)) as engine:
        responses = [
            await engine.save({"w": random_tensor(torch.uint8, (400_000 // (n + 1),), n)}, step=n)
            for n in range(4)
        ]
        for response in responses:
            await response.upload_completion
            latest = await engine.latest()
            assert latest is not None
            assert latest.step is not None
            seen.append(latest.step)
    assert seen == sorted(seen)
    assert seen[-1] == 3


# --- steps and names ------------------------------------------------------------------------------


async def test_the_default_name_holds_the_step(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, step=100)
        wide = await saved(engine, step=123_456_789_012)
    assert (info.checkpoint_id, info.step) == ("step-00000100", 100)
    assert (wide.checkpoint_id, wide.step) == ("step-123456789012", 123_456_789_012)


async def test_steps_count_up_by_themselves(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        steps = [(await saved(engine)).step for _ in range(3)]
        assert steps[0] in (0, 1)
        assert steps == list(range(steps[0], steps[0] + 3))
        assert (await saved(engine, step=40)).step == 40
        assert (await saved(engine)).step == 41
        assert (await saved(engine, step=7)).step == 7
        assert (await saved(engine)).step == 42


async def test_steps_go_on_after_those_on_disk(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=11)
        await saved(engine, step=3)
    async with CheckpointEngine(root) as engine:
        assert (await saved(engine)).step == 12


async def test_steps_go_on_after_those_that_were_never_committed(root: Path) -> None:
    (root / "step-00000041").mkdir(parents=True)
    async with CheckpointEngine(root) as engine:
        assert (await saved(engine)).step == 42


async def test_a_failed_step_is_not_given_out_again(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, step=4)
        faulty.fail("put", OSError("broken"))
        with pytest.raises(SaveError) as caught:
            await saved(engine)
        assert caught.value.step == 5
        faulty.heal()
        assert (await saved(engine)).step == 6


async def test_a_name_of_its_own_has_no_step(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=9)
        info = await saved(engine, checkpoint_id="best")
        both = await saved(engine, checkpoint_id="final", step=10)
        assert (info.checkpoint_id, info.step) == ("best", None)
        assert (both.checkpoint_id, both.step) == ("final", 10)
        assert_same(await engine.read("best"), STATE)
        assert (await saved(engine)).step == 11
    assert_holds_only(root, ["best", "final", "step-00000009", "step-00000011"])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../evil", "a/b", "/etc/evil", "a\0b", "..\\x/..", "x" * 300], ids=repr
)
async def test_names_that_are_no_directory_names_are_refused(root: Path, tmp_path: Path, name: str) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=1)
        with pytest.raises((ValueError, CheckpointError)):
            await saved(engine, checkpoint_id=name)
        assert (await saved(engine, step=2)).step == 2
    assert_holds_only(root, ["step-00000001", "step-00000002"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


async def test_the_name_that_means_the_newest_is_refused(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises((ValueError, CheckpointError)):
            await saved(engine, checkpoint_id="latest")


@pytest.mark.parametrize("step", [-1, 1.5, "7"])
async def test_steps_that_are_no_steps_are_refused(root: Path, step: Any) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises((ValueError, TypeError, CheckpointError)):
            await saved(engine, step=step)
        assert committed(root) == []
        await saved(engine)


async def test_notes_come_back(root: Path) -> None:
    notes = {"loss": 0.5, "tags": ["a", "b"], "nested": {"x": None, "y": True, "text": "uml\u00e4ut"}}
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, notes=notes)
        again = await engine.latest()
    assert dict(info.notes) == notes
    assert again is not None
    assert dict(again.notes) == notes


async def test_notes_that_are_no_json_are_refused_and_nothing_is_saved(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises((TypeError, ValueError, CheckpointError)):
            await saved(engine, notes={"x": object()})
        await engine.wait()
        assert committed(root) == []
        await saved(engine)


# --- existing names -------------------------------------------------------------------------------


async def test_an_existing_name_is_refused_by_save_itself(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=1)
        with pytest.raises(CheckpointExistsError, match="step-00000001") as caught:
            await engine.save(STATE | {"n": 2}, step=1)
        assert isinstance(caught.value, FileExistsError)
        assert isinstance(caught.value, SaveError)
        assert (caught.value.checkpoint_id, caught.value.step) == ("step-00000001", 1)
        await engine.wait()
        assert_same(await engine.read(1), STATE)


async def test_an_existing_name_is_refused_also_when_another_engine_made_it(root: Path) -> None:
    async with CheckpointEngine(root) as one, CheckpointEngine(root) as two:
        await saved(one, step=1)
        with pytest.raises(CheckpointExistsError):
            await two.save(STATE, step=1)


async def test_of_two_saves_of_one_engine_with_one_name_one_wins(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty, limits=Limits(pending_saves=2)) as engine:
        with faulty.hold("put"):
            first = await engine.save(STATE, step=1)
            try:
                second = (await engine.save(STATE | {"n": 2}, step=1)).upload_completion
            except CheckpointExistsError:
                second = None
        outcomes = [await _settled(first.upload_completion)]
        outcomes += [await _settled(second)] if second is not None else []
        winners = [n for n, outcome in enumerate(outcomes, 1) if isinstance(outcome, CheckpointInfo)]
        assert len(winners) == 1
        assert all(isinstance(outcome, CheckpointInfo | CheckpointExistsError) for outcome in outcomes)
        assert_same(await engine.read(1), STATE | {"n": winners[0]})


async def test_replace_publishes_the_new_state_and_drops_the_old_files(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=1)
        before = {path.name for path in (root / "step-00000001").iterdir()}
        await saved(engine, step=1, state=STATE | {"n": 2, "more": torch.ones(3)}, replace=True)
        assert_same(await engine.read(1), STATE | {"n": 2, "more": torch.ones(3)})
    after = {path.name for path in (root / "step-00000001").iterdir()}
    assert before & after == {".metadata"}
    assert_holds_only(root, ["step-00000001"])


async def test_replace_of_nothing_is_a_save(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=1, replace=True)
        assert_same(await engine.read(1), STATE)
    assert_holds_only(root, ["step-00000001"])


@pytest.mark.parametrize("verb", ["put", "seal", "commit"])
async def test_a_replaced_checkpoint_is_readable_until_the_new_one_is_there(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async with CheckpointEngine(faulty) as engine, CheckpointEngine(root) as reader:
        await saved(engine, step=1)
        with faulty.hold(verb) as gate:
            response = await engine.save(STATE | {"n": 2}, step=1, replace=True)
            await gate.until_arrived()
            assert_same(await reader.read(1), STATE)  # the engine itself would wait for its save
        await response.upload_completion
        assert_same(await engine.read(1), STATE | {"n": 2})


@pytest.mark.parametrize("verb", ["begin", "put", "seal", "commit"])
async def test_a_failed_replace_leaves_the_old_checkpoint(
    root: Path, faulty: FaultyStorage, verb: str
) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, step=1)
        faulty.fail(verb, OSError("broken"))
        with pytest.raises(SaveError):
            await saved(engine, step=1, state=STATE | {"n": 2}, replace=True)
        faulty.heal()
        assert_same(await engine.read(1), STATE)
        await saved(engine, step=2)
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def test_a_cancelled_replace_leaves_the_old_checkpoint(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        await saved(engine, step=1)
        with faulty.hold("put") as gate:
            response = await engine.save(STATE | {"n": 2}, step=1, replace=True)
            await gate.until_arrived()
            response.cancel()
            with pytest.raises(SaveError):
                await response.upload_completion
        assert_same(await engine.read(1), STATE)
        await saved(engine, step=2)
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def test_many_replaces_keep_one_set_of_files(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        for n in range(5):
            await saved(engine, checkpoint_id="best", state=STATE | {"n": n}, replace=True)
        assert_same(await engine.read("best"), STATE | {"n": 4})
    assert_holds_only(root, ["best"])


async def test_a_damaged_checkpoint_can_be_replaced(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await saved(engine, step=1)
        (root / "step-00000001" / ".metadata").write_bytes(b"garbage")
        await saved(engine, step=1, state=STATE | {"n": 2}, replace=True)
        assert_same(await engine.read(1), STATE | {"n": 2})


# --- races ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("verb", ["begin", "put", "commit"])
async def test_of_two_engines_with_one_fresh_name_exactly_one_wins(root: Path, verb: str) -> None:
    states = [STATE | {"n": n} for n in range(2)]
    overlap = StagingOptions(overlap=True)
    async with (
        faulty_storage(root) as first,
        faulty_storage(root) as second,
        CheckpointEngine(first, staging=overlap) as one,
        CheckpointEngine(second, staging=overlap) as two,
    ):
        with first.hold(verb, times=1) as first_gate, second.hold(verb, times=1) as second_gate:
            responses = [
                await engine.save(state, step=1) for engine, state in zip((one, two), states, strict=True)
            ]
            await first_gate.until_arrived()
            await second_gate.until_arrived()
        outcomes: list[Any] = [await _settled(response.upload_completion) for response in responses]
        assert sorted(isinstance(outcome, CheckpointExistsError) for outcome in outcomes) == [False, True]
        winner = next(n for n, outcome in enumerate(outcomes) if isinstance(outcome, CheckpointInfo))
        assert_same(await one.read(1), states[winner])
        assert_same(await two.read(1), states[winner])
        await saved(one, step=2)
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def _settled(handle: Any) -> Any:
    try:
        return await handle
    except Exception as error:
        return error


async def test_many_engines_race_for_one_name(root: Path) -> None:
    engines = [await CheckpointEngine(root).open() for _ in range(6)]
    try:

        async def attempt(n: int) -> Any:
            try:
                return await saved(engines[n], step=1, state=STATE | {"n": n})
            except Exception as error:
                return error

        outcomes = await asyncio.gather(*(attempt(n) for n in range(6)))
        winners = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, CheckpointInfo)]
        assert len(winners) == 1
        assert all(isinstance(outcome, CheckpointInfo | CheckpointExistsError) for outcome in outcomes)
        assert_same(await engines[0].read(1), STATE | {"n": winners[0]})
        await saved(engines[0], step=2)
    finally:
        for engine in engines:
            await engine.close()
    assert_holds_only(root, ["step-00000001", "step-00000002"])


async def test_a_running_save_of_one_engine_survives_the_sweep_of_another(
    root: Path, faulty: FaultyStorage
) -> None:
    async with CheckpointEngine(faulty) as one, CheckpointEngine(root) as two:
        with faulty.hold("commit") as gate:
            response = await one.save(STATE, step=1)
            await gate.until_arrived()
            for step in (2, 3):
                await saved(two, step=step)
        await response.upload_completion
        assert_same(await two.read(1), STATE)
    assert_holds_only(root, ["step-00000001", "step-00000002", "step-00000003"])


async def test_two_engines_may_share_one_storage(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as one, CheckpointEngine(faulty) as two:
        for n in range(0, 12, 2):
            await asyncio.gather(saved(one, step=n), saved(two, step=n + 1))
    async with CheckpointEngine(faulty) as third:
        assert_same(await third.read(), STATE)
    assert_holds_only(root, [f"step-{n:08d}" for n in range(12)])


# --- a stager of the user's own -------------------------------------------------------------------


@pytest.mark.usefixtures("both_loops")
async def test_one_stager_serves_two_engines(tmp_path: Path) -> None:
    async with Stager(SMALL) as stager:
        async with (
            CheckpointEngine(tmp_path / "a", staging=stager) as one,
            CheckpointEngine(tmp_path / "b", staging=stager) as two,
        ):
            wide = {"w": random_tensor(torch.uint8, (20 * PART,), 3)}
            for n in range(3):
                await asyncio.gather(saved(one, state=STATE | {"n": n}), saved(two, state=wide))
            assert_same(await one.read(), STATE | {"n": 2})
            assert_same(await two.read(), wide)
        async with CheckpointEngine(tmp_path / "a", staging=stager) as third:
            await saved(third, state=wide)
            assert_same(await third.read(), wide)


async def test_an_aborted_engine_leaves_the_users_stager_whole(tmp_path: Path, faulty: FaultyStorage) -> None:
    wide = {"w": random_tensor(torch.uint8, (20 * PART,), 3)}
    options = StagingOptions(part_bytes=PART, budget_bytes=ASIDE_BYTES + 4 * PART, overlap=True)
    async with Stager(options) as stager, CheckpointEngine(tmp_path / "b", staging=stager) as two:
        one = await CheckpointEngine(faulty, staging=stager).open()
        with faulty.hold("put") as gate:
            response = await one.save(wide)
            await gate.until_arrived()
            await one.abort()
        assert response.upload_completion.done()
        await asyncio.wait_for(saved(two, state=wide), PATIENCE)
        assert_same(await two.read(), wide)


async def test_a_shared_stager_keeps_one_budget(tmp_path: Path) -> None:
    before = mapped_arena_bytes()
    wide = {"w": random_tensor(torch.uint8, (20 * PART,), 3)}
    async with (
        Stager(SMALL) as stager,
        CheckpointEngine(tmp_path / "a", staging=stager) as one,
        CheckpointEngine(tmp_path / "b", staging=stager) as two,
    ):
        await asyncio.gather(saved(one, state=wide), saved(two, state=wide))
        assert mapped_arena_bytes() - before <= 4 * PART


async def test_failed_saves_leave_no_file_after_the_next(root: Path, faulty: FaultyStorage) -> None:
    async with CheckpointEngine(faulty) as engine:
        for step, verb in enumerate(["begin", "put", "seal", "commit"]):
            faulty.fail(verb, OSError("broken"))
            with pytest.raises(SaveError):
                await saved(engine, step=step)
            faulty.heal()
        await saved(engine, step=10)
    assert leftovers(root) == []
