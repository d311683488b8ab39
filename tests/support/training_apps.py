"""A training run whose model is wrapped in one of the ways that change the names of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dcp_async import AppState
from tests.support.doubles import Net, TrainingRun, frozen


def _plain(model: Net) -> nn.Module:
    return model


def _compiled(model: Net) -> Any:
    return torch.compile(model, backend="eager")


def _recomputing(model: Net) -> nn.Module:
    model.hidden = checkpoint_wrapper(model.hidden)  # type: ignore[assignment]  # it computes what the layer did
    return model


def _compiled_inside(model: Net) -> nn.Module:
    model.hidden = torch.compile(model.hidden, backend="eager")  # type: ignore[assignment]
    return model


def _replicated(model: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[Net], Any]] = {
    "plain": _plain,
    "compiled": _compiled,
    "compiled_inside": _compiled_inside,
    "recomputing": _recomputing,
}
DISTRIBUTED: dict[str, Callable[[Net], Any]] = {
    "ddp": _replicated,
    "ddp_of_all": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(_recomputing(model)), backend="eager"
    ),
}
"""These need a process group."""


class WrappedRun(TrainingRun):
    """A TrainingRun that trains through the wrapped model; compiled ones run eagerly, to save time."""

    def __init__(self, seed: int, kind: str, **options: Any) -> None:
        super().__init__(seed, **options)
        self.inner = self.model
        self.names = list(self.model.state_dict())
        self.model = (WRAPPERS | DISTRIBUTED)[kind](self.model)

    def step(self, count: int = 1) -> None:
        with torch.compiler.set_stance("force_eager"):
            super().step(count)

    @property
    def app(self) -> dict[str, Any]:
        return {"app": AppState(self.model, self.optim), "scheduler": self.scheduler}

    def picture(self) -> Any:
        """By the names of a plain model, so that runs of all kinds can be compared."""
        tensors = [*self.inner.state_dict().values()]
        return frozen(
            {
                "model": dict(zip(self.names, tensors, strict=True)),
                "optim": self.optim,
                "scheduler": self.scheduler,
            }
        )


@contextmanager
def world_of_one() -> Iterator[None]:
    """A process group of gloo's with this process alone in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
