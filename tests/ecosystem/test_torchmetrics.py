"""Metrics of torchmetrics, whose list states grow from nothing while they are updated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from dcp_async import AppState, CheckpointEngine

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def _auroc() -> Any:
    return BinaryAUROC(thresholds=None)  # exact: keeps every prediction in a list


METRICS: dict[str, Callable[[], Any]] = {
    "list states": _auroc,
    "a list of what was seen": CatMetric,
    "tensor states": lambda: MulticlassAccuracy(3),
    "a collection": lambda: MetricCollection({"auroc": _auroc(), "cat": CatMetric(), "mean": MeanMetric()}),
}


def _updated(kind: str, metric: Any, batches: int) -> Any:
    torch.manual_seed(1)
    metric.persistent(True)
    for _ in range(batches):
        if kind == "list states":
            metric.update(torch.rand(5), torch.randint(2, (5,)))
        elif kind == "tensor states":
            metric.update(torch.randint(3, (5,)), torch.randint(3, (5,)))
        elif kind == "a collection":
            metric["auroc"].update(torch.rand(5), torch.randint(2, (5,)))
            metric["cat"].update(torch.rand(5))
            metric["mean"].update(torch.rand(5))
        else:
            metric.update(torch.rand(5))
    return metric


@pytest.mark.filterwarnings("ignore:The .* method of metric")
@pytest.mark.parametrize("held", ["alone", "in a module", "in an AppState"])
@pytest.mark.parametrize("batches", [0, 2])
@pytest.mark.parametrize("kind", METRICS)
async def test_a_metric_goes_on_where_it_was(tmp_path: Path, kind: str, batches: int, held: str) -> None:
    def wrap(metric: Any) -> Any:
        if held == "alone":
            return metric
        module = nn.ModuleDict({"layer": nn.Linear(2, 2), "metric": metric})
        return module if held == "in a module" else AppState(module)

    one, fresh = _updated(kind, METRICS[kind](), 4), _updated(kind, METRICS[kind](), batches)
    async with CheckpointEngine(tmp_path / "run") as engine:
        await engine.save({"m": wrap(one)})
        await engine.wait()
        report = await engine.load({"m": wrap(fresh)})
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    found, expected = fresh.compute(), one.compute()
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    else:
        assert torch.equal(found, expected)
