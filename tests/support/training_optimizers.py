"""Small trainers, one for each optimizer of torch.optim and each flavour of it that keeps state of its own.

What enters: the name of a case and a seed. What leaves: a Trainer whose steps depend on nothing but its own
state, so that two processes that are in the same state take the same steps, bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tests.support.doubles import frozen

Make = Callable[[nn.Module], Optimizer]

DENSE = [
    torch.optim.Adadelta, torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.ASGD, torch.optim.Muon, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
]  # fmt: skip
LISTED: frozenset[type[Optimizer]] = frozenset({*DENSE, torch.optim.LBFGS, torch.optim.SparseAdam})
"""Every optimizer that some case below is about."""


def of_class(cls: type[Optimizer], **options: Any) -> Make:
    return lambda model: cls(model.parameters(), **options)


def _flavours() -> Iterator[tuple[str, Make]]:
    """What each class takes of the options that choose another implementation."""
    for cls in DENSE:
        name = cls.__name__.lower()
        takes = inspect.signature(cls).parameters
        yield name, of_class(cls)
        for option in ("foreach", "fused", "maximize"):
            if option in takes:
                yield f"{name}_{option}", of_class(cls, **{option: True})
        if "differentiable" in takes:
            yield f"{name}_differentiable", of_class(cls, differentiable=True)


def _groups(model: nn.Module) -> Optimizer:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "lr": 3e-3}, {"params": plain, "weight_decay": 0.0, "betas": (0.8, 0.9)}]
    )


def _late_group(model: nn.Module) -> Optimizer:
    first, *others = model.parameters()
    optim = torch.optim.SGD([first], lr=0.1, momentum=0.5)
    optim.add_param_group({"params": others, "momentum": 0.0, "label": "late"})
    return optim


CASES: dict[str, Make] = dict(_flavours()) | {
    "adam_amsgrad": of_class(torch.optim.Adam, amsgrad=True),
    "adamw_amsgrad_fused": of_class(torch.optim.AdamW, amsgrad=True, fused=True),
    "adamw_lr_tensor": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.02)),
    "adam_betas_tensor": lambda model: torch.optim.Adam(
        model.parameters(), betas=(torch.tensor(0.85), torch.tensor(0.95)), foreach=False
    ),
    "adamw_groups": _groups,
    "adamw_named": lambda model: torch.optim.AdamW(model.named_parameters()),
    "sgd_momentum": of_class(torch.optim.SGD, momentum=0.9),
    "sgd_momentum_fused": of_class(torch.optim.SGD, momentum=0.9, fused=True),
    "sgd_nesterov": of_class(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd_dampening": of_class(torch.optim.SGD, momentum=0.9, dampening=0.3),
    "sgd_late_group": _late_group,
    "rmsprop_centered": of_class(torch.optim.RMSprop, centered=True, momentum=0.9),
    "adagrad_accumulated": of_class(torch.optim.Adagrad, initial_accumulator_value=0.3, lr_decay=0.1),
    "asgd_averaging": of_class(torch.optim.ASGD, t0=2.0),
    "nadam_decoupled": of_class(torch.optim.NAdam, decoupled_weight_decay=True, weight_decay=0.1),
    "radam_decoupled": of_class(torch.optim.RAdam, decoupled_weight_decay=True, weight_decay=0.1),
    "lbfgs": of_class(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "lbfgs_full_history": of_class(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=2),
    "lbfgs_strong_wolfe": of_class(torch.optim.LBFGS, max_iter=3, line_search_fn="strong_wolfe"),
    "sparseadam": of_class(torch.optim.SparseAdam, lr=0.05),
    "sparseadam_maximize": of_class(torch.optim.SparseAdam, maximize=True),
}

MAIN = [
    "adadelta", "adafactor", "adagrad", "adam_amsgrad", "adamw_fused", "adamw_lr_tensor", "adamw_groups",
    "adamax", "asgd_averaging", "lbfgs", "lbfgs_strong_wolfe", "muon", "nadam", "radam", "rmsprop_centered",
    "rprop", "sgd_momentum", "sgd", "sparseadam",
]  # fmt: skip
"""One or two of each class, for tests that would take too long with all."""


class _Dense(nn.Module):
    """Parameters of two dimensions only (Muon takes no others), unless there shall be more."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, width, bias=bias)
        self.last = nn.Linear(width, 4, bias=bias)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(torch.tanh(self.first(batch)))
        return output.square().mean()


class _Sparse(nn.Module):
    """Its gradients are sparse: SparseAdam takes no others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width, sparse=True)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.embed(batch.flatten()[:5].abs().mul(3).long().clamp(max=11))
        return rows.square().mean()


class _Unrolled(nn.Module):
    """Tensors with a history, as they are where somebody differentiates through the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Parameter(torch.randn(2, 6, 5))
        self.weights = [self.source[0].clone(), self.source[1].clone()]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        yield from self.weights  # type: ignore[misc]  # no leaves, which only a differentiable optimizer takes

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.tanh(batch @ self.weights[0] + batch @ self.weights[1]).square().mean()


class Trainer:
    """A model, one optimizer and a count of steps, which alone says what the next batch is."""

    def __init__(self, case: str, seed: int, *, width: int = 5) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module
        if case.startswith("sparse"):
            self.model = _Sparse(width)
        elif case.endswith("_differentiable"):
            self.model = _Unrolled()
        else:
            self.model = _Dense(width, bias=not case.startswith("muon"))
        self.optim = CASES[case](self.model)
        self.progress = {"taken": 0}

    @property
    def state(self) -> dict[str, Any]:
        weights = self.model.weights if isinstance(self.model, _Unrolled) else self.model
        return {"model": weights, "optim": self.optim, "progress": self.progress}

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            generator = torch.Generator().manual_seed(1000 + self.progress["taken"])
            batch = torch.randn(8, 6, generator=generator)
            if isinstance(self.model, _Unrolled):
                grads = torch.autograd.grad(self.model(batch), self.model.weights, retain_graph=True)
                for weight, grad in zip(self.model.weights, grads, strict=True):
                    weight.retain_grad()
                    weight.grad = grad
                self.optim.step()
            else:
                self.optim.step(partial(self._closure, batch))
            self.progress["taken"] += 1

    def _closure(self, batch: torch.Tensor) -> float:
        self.optim.zero_grad()
        loss: torch.Tensor = self.model(batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        return float(loss.detach())

    def picture(self) -> Any:
        return frozen(self.state)
