"""Processes that are killed, and servers that fail, in the middle of saves to a bucket and loads from it.

A moment is a request, counted by a proxy on the way. `--kills N` says how many moments there are.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dcp_async import CheckpointEngine, CheckpointError
from dcp_async._names import METADATA, owned_file
from dcp_async.formats import uids_named_in
from dcp_async.storage import Retries
from dcp_async.storage.object_store import lease
from tests.buckets import agent
from tests.buckets.test_contract import ServerContract
from tests.support.buckets import BUCKET, Fault, Proxy, Seaweed, Server, moto_server, proxy_to, seaweed_server
from tests.support.processes import CONTEXT, run_in_processes

MIB = 1 << 20
PATIENCE = 60.0
REQUESTS_OF_A_SAVE = 14
PATIENT = Retries(attempts=40, seconds=60.0, first_pause=0.05, longest_pause=0.5)
"""Longer than a server takes to come back."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kills = metafunc.config.getoption("--kills")
    few = max(1, kills // 5)
    counts = (("moment", range(kills if kills > 5 else 1)), ("some", range(few)), ("round_", range(kills)))
    for name, values in counts:
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def request_of(moment: int) -> int:
    """The request of a save that is the moment of that number, all of them in turn."""
    return (moment * 4 + 3) % REQUESTS_OF_A_SAVE


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path_factory.mktemp("seaweed") / "run") as seaweed:
        yield seaweed


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return tmp_path.as_posix().strip("/")


@pytest.fixture(scope="module")
def moto() -> Iterator[Server]:
    with moto_server() as server:
        yield server


@pytest.mark.faults_session
class TestMoto(ServerContract):
    @pytest.fixture(autouse=True)
    def _served(self, moto: Server) -> None:
        self.server = moto


def test_ranks_save_to_one_bucket_and_load_their_shares(weed: Seaweed, prefix: str, tmp_path: Path) -> None:
    jobs = [
        (agent.save_and_load, (tmp_path / "store", rank, 2, weed.server.endpoint, prefix))
        for rank in range(2)
    ]
    firsts = run_in_processes(jobs)
    assert firsts[0] + firsts[1] == agent.rows_of(2)[:, 0].tolist()
    assert not [key for key in weed.server.keys(prefix) if ".lease-" in key]


# -- killed processes


def killed_at(proxy: Proxy, moment: int, processes: list[ForkServerProcess]) -> asyncio.Event:
    """Has ``processes`` killed when the request of that number after the second save has begun comes."""
    killed, begun, count = asyncio.Event(), 0, 0

    def look(line: str) -> Fault | None:
        nonlocal begun, count
        if agent.BEGUN in line:
            begun += f"{agent.BEGUN}2" in line
        elif begun == len(processes):
            if count == request_of(moment):
                for process in processes:
                    process.kill()
                killed.set()
            count += 1
        return Fault("reset") if killed.is_set() else None

    proxy.fault = look
    return killed


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.faults_session)])
async def test_a_kill_in_the_middle_of_a_save_costs_that_save_alone(
    weed: Seaweed, prefix: str, tmp_path: Path, moment: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxy_to(weed.server) as proxy:
        processes = [
            CONTEXT.Process(
                target=agent.save_until_killed,
                args=(tmp_path / "store", rank, world, proxy.server.endpoint, prefix),
            )
            for rank in range(world)
        ]
        killed = killed_at(proxy, moment, processes)
        try:
            for process in processes:
                process.start()
            ended = asyncio.ensure_future(asyncio.gather(*(joined(process) for process in processes)))
            await asyncio.wait_for(ended, PATIENCE)
        finally:
            for process in processes:
                process.kill()
                process.join()
    async with CheckpointEngine(weed.server.storage(prefix)) as engine:
        target: dict[str, Any] = {"rows": torch.zeros(agent.ROWS, agent.COLUMNS), "step": 0}
        step = (await engine.load(target)).step
        assert killed.is_set()
        assert step in (1, 2)
        assert torch.equal(target["rows"], agent.rows_of(target["step"]))
        assert target["step"] == step
    # hours later
    now = lease._server_time

    async def later(bucket: Any) -> float:
        return await now(bucket) + 3600.0

    monkeypatch.setattr(lease, "_server_time", later)
    await weed.server.storage(prefix).sweep(named=uids_named_in)
    check_clean(weed.server, prefix)


async def joined(process: ForkServerProcess) -> None:
    await asyncio.to_thread(process.join, PATIENCE)


def check_clean(server: Server, prefix: str) -> None:
    """Nothing is there but whole checkpoints."""
    assert server.open_uploads(prefix) == []
    by_name: dict[str, list[str]] = {}
    for key in server.keys(prefix):
        name, _, file = key[len(prefix) + 1 :].partition("/")
        by_name.setdefault(name, []).append(file)
    for files in by_name.values():
        assert METADATA in files
        owned = [owned_file(file) for file in files if file != METADATA]
        assert {file.kind for file in owned if file is not None} == {"data", "manifest"}
        assert len({file.uid for file in owned if file is not None}) == 1


# -- servers


def state_of(value: float) -> dict[str, Any]:
    return {"w": torch.full((3 * MIB,), value), "b": torch.arange(1000) * int(value), "step": int(value)}


def is_state_of(state: dict[str, Any], value: float) -> bool:
    wanted = state_of(value)
    return all(torch.equal(state[name], wanted[name]) for name in ("w", "b")) and state["step"] == int(value)


@pytest.mark.faults_session
async def test_a_server_that_dies_in_the_middle_of_a_save_and_comes_back_loses_nothing(
    tmp_path: Path, prefix: str, some: int
) -> None:
    with seaweed_server(tmp_path / "weed") as weed:
        restarted: list[asyncio.Task[None]] = []

        async def restart() -> None:
            weed.kill()
            await asyncio.to_thread(weed.start)

        async with proxy_to(weed.server) as proxy:
            storage = proxy.server.storage(prefix, retries=PATIENT)
            async with CheckpointEngine(storage) as engine:
                await (await engine.save(state_of(1.0), step=1)).upload_completion
                first = len(proxy.seen)

                def look(line: str) -> Fault | None:
                    if len(proxy.seen) == first + 1 + request_of(some) and not restarted:
                        restarted.append(asyncio.ensure_future(restart()))
                        return Fault("reset")
                    return None

                proxy.fault = look
                await (await engine.save(state_of(2.0), step=2)).upload_completion
                await asyncio.gather(*restarted)
                state = state_of(0.0)
                assert (await engine.load(state)).step == 2
                assert is_state_of(state, 2.0)
        assert weed.server.open_uploads(prefix) == []


KINDS = ["status", "reset", "lost answer", "truncate", "flip"]


@pytest.mark.faults_session
async def test_what_goes_wrong_on_the_way_is_never_silently_wrong(
    weed: Seaweed, prefix: str, round_: int
) -> None:
    rng = random.Random(round_)

    def look(line: str) -> Fault | None:
        if rng.random() > 0.12:
            return None
        kind: Any = rng.choice(KINDS)
        if kind in ("truncate", "flip") and not line.startswith("GET"):
            return None
        return Fault(kind, rng.choice([500, 503, 429]))

    outcomes: list[str] = []
    async with proxy_to(weed.server) as proxy:
        for value in range(1, 6):
            proxy.fault = look
            storage, name = proxy.server.storage(prefix), f"n{value}"
            try:
                async with CheckpointEngine(storage) as engine:
                    response = await engine.save(state_of(float(value)), checkpoint_id=name)
                    await response.upload_completion
            except CheckpointError as error:
                outcomes.append(str(error))
            state = state_of(0.0)
            try:
                async with CheckpointEngine(storage) as engine:
                    await engine.load(state, name)
            except CheckpointError as error:
                outcomes.append(str(error))
            else:
                outcomes.append("")
                assert is_state_of(state, float(value))
            proxy.fault = lambda line: None
    # each failure names what it failed at; a flipped bit is one, since it may as well be in the bucket
    assert all(re.search(rf"s3://{BUCKET}/{prefix}|n[1-5]", outcome) for outcome in outcomes if outcome)
    assert outcomes.count("") >= 1, outcomes
