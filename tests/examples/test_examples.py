"""The examples as their readers run them: real processes, what they print, the status they end with."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dcp_async import sync

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 90.0  # seconds; far above what an example needs, so that a hang ends as a failure

pytestmark = pytest.mark.timeout(4 * PATIENCE)  # some tests run three, one after the other


@contextmanager
def started(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A running example and its stdout; it does not outlive the block."""
    command = [sys.executable, str(REPOSITORY / "examples" / script), *map(str, arguments)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def lines_of(script: str, *arguments: object) -> list[str]:
    """What an example prints that ends well."""
    with started(script, *arguments) as process:
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stdout
    return stdout.splitlines()


def steps(lines: Sequence[str], what: str) -> list[int]:
    """The steps of the lines that say `what`."""
    return [int(found[1]) for line in lines if what in line and (found := re.search(r"step +(\d+)", line))]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_pipeline_stopped_between_two_saves_trains_on_the_same_samples(loop: str) -> None:
    arguments = ("--steps=12", "--save-every=4", "--stop-after=6", "--batch-size=4", f"--loop={loop}")
    lines = lines_of("async_data_pipeline.py", *arguments, "--num-shards=3", "--num-records=10")

    assert loop in lines[0]
    assert any(line.startswith("B'") and "starts at step 5" in line for line in lines)
    assert steps([line for line in lines if line.startswith("A ")], "on the disk") == [4, 8, 12]
    *_, place, ahead, records, weights = lines
    assert place == "proved: stopped after step 6, B went on behind step 4"
    assert re.fullmatch(r"proved: \d+ records had been read ahead, the queues hold 40 at most", ahead)
    assert records == "proved: A and B trained on the same 48 records, in the same order"
    assert re.fullmatch(r"proved: A and B ended with the same weights, bit for bit: [0-9a-f]{16}", weights)


def test_sync_trainer_killed_behind_its_first_save_ends_with_the_same_weights(tmp_path: Path) -> None:
    size = ("--steps=800", "--save-every=20")
    expected = lines_of("sync_trainer.py", "--root", tmp_path / "whole", *size)
    assert expected[0] == "fresh start"
    assert steps(expected, "on the disk") == list(range(20, 801, 20))

    with started("sync_trainer.py", "--root", tmp_path / "killed", *size) as process:
        assert process.stdout is not None
        committed = next(line for line in process.stdout if "on the disk" in line)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
    assert process.returncode == -signal.SIGKILL, "it was done before the signal came"
    assert steps([committed], "on the disk") == [20]

    resumed = lines_of("sync_trainer.py", "--root", tmp_path / "killed", *size)
    (place,) = steps(resumed[:1], "resumed behind")
    assert 20 <= place < 800
    assert place % 20 == 0
    assert steps(resumed, "on the disk")[0] == place + 20
    assert re.fullmatch(r"done at step 800, weights sha256 [0-9a-f]{64}", resumed[-1])
    assert resumed[-1] == expected[-1]


def test_a_trainer_told_to_stop_saves_the_step_that_it_is_at(tmp_path: Path) -> None:
    size = ("--steps=10000", "--save-every=1000", "--width=28", "--depth=1", "--log-every=1")
    with started("async_trainer.py", "--out", tmp_path, *size) as process:
        assert process.stdout is not None
        # within the block, and far from the first save that its policy asks for
        next(line for line in process.stdout if "loss" in line)
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stdout
    stopped = re.search(r"stopped behind step (\d+)", stdout)
    assert stopped is not None, stdout
    with sync.CheckpointEngine(tmp_path) as engine:
        latest = engine.latest()
        assert latest is not None
        assert latest.step == int(stopped[1])
