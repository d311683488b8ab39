"""A save `beside` the capture of a graph in CUDA's default mode, or asked for `inside` of one."""

from __future__ import annotations

import sys

import pytest
import torch

from dcp_async import SaveError, StagingOptions, sync
from tests.support.devices import keep_busy

DEVICE = torch.device("cuda", 0)
SIZE = 64 << 20


def beside(engine: sync.CheckpointEngine) -> None:
    """The state is staged, into memory that is registered meanwhile, while this thread captures."""
    weights, inputs = torch.ones(SIZE, device=DEVICE), torch.ones(1024, 1024, device=DEVICE)
    product = inputs @ inputs  # libraries make what they need before the capture
    keep_busy(DEVICE, 500)
    response = engine.save({"w": weights}, step=1)
    graph = torch.cuda.CUDAGraph()
    # not torch.cuda.graph(), which waits for the device first, and so for what the save has queued
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)):  # type: ignore[no-untyped-call]
        graph.capture_begin()
        for _ in range(2000):
            product = inputs @ inputs
        graph.capture_end()
    graph.replay()
    response.upload_completion.result(60)
    assert engine.read(1)["w"].eq(1).all()
    assert product.eq(1024).all()


def inside(engine: sync.CheckpointEngine) -> None:
    """It is refused by name, and the capture goes on."""
    weights, inputs = torch.ones(1024, device=DEVICE), torch.ones(1024, 1024, device=DEVICE)
    product = inputs @ inputs
    engine.save({"w": weights}, step=1).upload_completion.result(60)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(SaveError, match="captur"):
            engine.save({"w": weights}, step=2)
        product = inputs @ inputs
    graph.replay()
    assert product.eq(1024).all()
    engine.save({"w": weights}, step=3).upload_completion.result(60)


if __name__ == "__main__":
    with sync.CheckpointEngine(sys.argv[1], staging=StagingOptions(overlap=True)) as opened:
        {"beside": beside, "inside": inside}[sys.argv[2]](opened)
