"""The example of a resharded run at its smallest: what it shows, what it refuses to claim, what it leaves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dcp_async import CheckpointEngine
from demo import DemoError, Screen
from fsdp_story import LOSS_TOLERANCE, compare_losses, compare_tensors, draw

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 240.0  # seconds; far above what the story needs, so that a hang ends as a failure
SIZE = ("--steps=8", "--save-every=2", "--log-every=1", "--lose-at=4", "--global-batch=4", "--context=16")
MODEL = ("--width=32", "--depth=1", "--heads=2")


@contextmanager
def story(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """The running example; it is terminated with the block, and ends its jobs itself."""
    where = ("--dir", str(directory), "--chart", str(directory / "loss.svg"))
    command = [sys.executable, str(REPOSITORY / "examples" / "fsdp_reshard.py"), *where, *SIZE, *MODEL]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()


def processes_of(directory: Path) -> list[str]:
    """Command lines of processes that name `directory`: those of the story, of torchrun, of ranks."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if str(directory) in command:
            found.append(command)
    return found


@pytest.mark.timeout(2 * PATIENCE)
def test_a_job_that_lost_a_rank_goes_on_with_half_as_many(tmp_path: Path) -> None:
    with story(tmp_path) as process:
        stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stdout
    lines = [line.strip() for line in stdout.splitlines()]

    lost = max(int(found[1]) for line in lines if (found := re.search(r"as it saves step (\d+)", line)))
    assert lost in (4, 6, 8)
    assert any(re.match(r"rank 0, 1, 2: SaveError: saving .* on rank 3: rank 3", line) for line in lines)
    assert "each survivor has a SaveError that names rank 3" in lines
    assert f"resumed from step {lost - 2} on 2 ranks: 0.03 M parameters" in lines
    for reader in ("engine.read()", "stock dcp.load()"):
        (claim,) = (line for line in lines if line.startswith(reader))
        assert re.search(r" the same 48 tensors, .* MB, bit for bit", claim)
    assert any(
        line.startswith(f"both took steps {lost - 1} to {lost}, with the same losses") for line in lines
    )
    assert lines[-1].startswith("every claim held")

    chart = ElementTree.parse(tmp_path / "loss.svg")
    curves = chart.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len((curve.get("points") or "").split()) for curve in curves] == [lost, 8 - (lost - 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["loss.svg"]
    assert processes_of(tmp_path) == []


@pytest.mark.timeout(2 * PATIENCE)
def test_a_terminated_story_takes_its_jobs_with_it(tmp_path: Path) -> None:
    with story(tmp_path) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "fresh start on 4 ranks" in line)
        assert len(processes_of(tmp_path)) == 6  # the story, torchrun, ranks
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 130
    assert processes_of(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_jumps_is_no_continuation() -> None:
    before = {1: 3.0, 2: 2.5, 3: 2.25}
    compare_losses(Screen(), before, {2: 2.5, 3: 2.25, 4: 2.0}, 1)
    with pytest.raises(DemoError, match="differ by"):
        compare_losses(Screen(), before, {2: 2.5, 3: 2.25 + 2 * LOSS_TOLERANCE}, 1)
    with pytest.raises(DemoError, match="B began with step 3, not with 2"):
        compare_losses(Screen(), before, {3: 2.25, 4: 2.0}, 1)


async def test_one_other_bit_is_told_by_its_name(tmp_path: Path) -> None:
    weights = {"model": {"one": torch.ones(3), "two": torch.zeros(2)}}
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"app": weights}, step=1)).upload_completion
    checkpoint = tmp_path / "step-00000001"
    await compare_tensors(Screen(), checkpoint, weights)

    weights["model"]["two"][1] = -0.0
    with pytest.raises(DemoError, match=re.escape("engine.read() gives other values for model.two")):
        await compare_tensors(Screen(), checkpoint, weights)
    with pytest.raises(DemoError, match=re.escape("differ in the names ['model.two']")):
        await compare_tensors(Screen(), checkpoint, {"model": {"one": torch.ones(3)}})


def test_the_chart_marks_the_save_that_was_cut_short() -> None:
    chart = ElementTree.fromstring(
        draw({1: 3.0, 2: 2.5, 3: 2.25}, {2: 2.5, 3: 2.25, 4: 2.0}, 1, {1: True, 3: False})
    )
    svg = "{http://www.w3.org/2000/svg}"
    # one of each is the legend's
    assert len(chart.findall(f"{svg}circle")) == 2
    assert len(chart.findall(f"{svg}path")) == 2
    assert len(chart.findall(f"{svg}polyline")) == 2
