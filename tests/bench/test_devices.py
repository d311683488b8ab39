"""What is measured where the state lies on a device, each line run on the CPU, and what its page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engines, gpu, measuring, reporting
from bench.measuring import device_workers, workloads
from bench.reporting import device_page, results

from .test_reporting import MACHINE


@pytest.fixture
def workload() -> workloads.Workload:
    return workloads.on_device(workloads.build("many", 0.001), torch.device("cpu"))


def test_an_engine_answers_each_command(tmp_path: Path, workload: workloads.Workload) -> None:
    worker = device_workers.make(engines.OURS, workload, tmp_path)
    assert {"call", "device"} == worker.commands["describe"]().keys()
    assert worker.commands["prepare"]()["prepare"] > 0
    saved = worker.commands["save"]()
    assert 0 < saved["blocked"] <= saved["staged"] <= saved["durable"]
    assert worker.commands["beside"](seconds=0.01, saves=1).keys() >= {"step_alone", "staged_beside_python"}
    assert worker.commands["memory"]()["device_extra_bytes"] == 0
    worker.commands["prepare_load"]()
    assert worker.commands["load"](cold=False)["num_different"] == 0
    worker.close()


def test_the_link_is_measured_one_copy_at_a_time(tmp_path: Path, workload: workloads.Workload) -> None:
    worker = device_workers.make(engines.RAW, workload, tmp_path)
    link = worker.commands["link"]()
    assert set(link) | set(worker.commands["disk"]()) == set(device_page.LINK.values())
    assert min(link.values()) > 0
    worker.close()


def test_a_share_that_is_up_leaves_the_first_round() -> None:
    assert list(gpu.Share(-1.0).rounds(3, 0.5)) == [0]
    assert list(gpu.Share(1e9).rounds(3, 0.5)) == [0, 1, 2]


def test_without_an_accelerator_one_is_told_of_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.accelerator.is_available():
        assert gpu.parse([]).scale == 1
        return
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "--device cpu runs every line" in capsys.readouterr().err
    assert gpu.parse(["--device", "cpu"]).scale < 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_goals_are_judged_on_an_accelerator_only(device: str, tmp_path: Path) -> None:
    configuration = {"device": device, "runs": 1, "scale": 1.0, "quick": False, "minutes": 1.0}
    data: results.Data = {**results.new(configuration, MACHINE), "kind": "gpu"}
    fact: dict[str, Any] = {
        "call": "call()",
        "nbytes": 1 << 30,
        "num_tensors": 64,
        "torch": "2",
        "threads": 2,
    }
    samples: dict[str, dict[str, list[Any]]] = {
        "raw": {"one_pinned_copy": [0.02]},
        "dcp_async": {"staged": [0.021, 0.022, 0.5]},
        "dcp_async overlap": {"staged": [0.04]},
    }
    facts = dict.fromkeys(samples, fact | {"device": "a card"})
    results.add(data, "large", measuring.Group([], facts=facts, samples=samples))
    reporting.write(data, tmp_path / "gpu.json")
    text = reporting.write_all(json.loads((tmp_path / "gpu.json").read_text()), tmp_path)
    assert "| staged, GB/s | 48.8 | 26.8 |" in text
    judged = "dcp_async: 91% of one pinned copy's rate; goal 90%: met" in text
    assert judged == ("dcp_async overlap: 50% of one pinned copy's rate" in text) == (device != "cpu")
