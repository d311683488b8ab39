"""Statefuls that we offer, and what counts as one.

Enters: live objects of a trainer. Leaves: plain dicts of tensors and leaves by ``state_dict()``, and what
``load_state_dict()`` puts back. Each is an ordinary DCP Stateful: stock's save and load take them too.
Source: torch/distributed/checkpoint/stateful.py, state_dict.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

_MARK = "dcp_async: no state yet"


def is_stateful(value: object) -> bool:
    """DCP's ``Stateful``, looked up on the type: the protocol's own isinstance costs microseconds per
    leaf."""
    cls = type(value)
    return hasattr(cls, "state_dict") and hasattr(cls, "load_state_dict") and not isinstance(value, type)


class PerRank:
    """Marks what differs between ranks, a data loader's position for one: each rank saves and loads its own.

    Args:
        value: a Stateful or a picklable value.
        on_resize: gets what all ranks had saved, in their order, when a checkpoint of another world size is
            loaded, and returns what this rank shall load. Without it such a load is refused.
    """

    def __init__(self, value: Any, *, on_resize: Callable[[list[Any]], Any] | None = None) -> None:
        self.value = value
        self.on_resize = on_resize

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"

    @staticmethod
    def key(rank: int) -> str:
        """The name that a rank's own lies under."""
        return f"rank_{rank}"


class RNGState:
    """A Stateful that brings the random number generators back to where they were: torch's, Python's, and
    numpy's if it is used."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state()
        if torch.accelerator.is_available():
            device = torch.accelerator.current_device_index()
            state["accelerator"] = torch.get_device_module().get_rng_state(device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])
        if "numpy" in state and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(state["numpy"])
        if "accelerator" in state and torch.accelerator.is_available():
            device = torch.accelerator.current_device_index()
            torch.get_device_module().set_rng_state(state["accelerator"].cpu(), device)


class AppState:
    """A Stateful of a model and its optimizers by canonical names, so that a checkpoint does not depend on
    how the model is wrapped: compiled, DDP, FSDP and activation-checkpointed models share it with the plain
    one.

    torch's ``get_state_dict`` and ``set_state_dict`` do the work, but for one thing: they make the state of
    an optimizer that has none by a step with a learning rate of 0, which changes the run that is saved (Adam
    counts it). The engine saves such an optimizer as it is, unless ``options`` ask for a flat dict.
    Optimizers share one mapping, so a parameter may be in one of them only.

    Args:
        model: the module, wrapped or not.
        optimizers: one or several over its parameters.
        options: torch's ``StateDictOptions``, for both directions.
    Raises: TypeError for arguments of other types.
    Source: torch/distributed/checkpoint/state_dict.py.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: Optimizer | Iterable[Optimizer] = (),
        *,
        options: StateDictOptions | None = None,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"AppState(model) takes a torch.nn.Module, not a {type(model).__name__}")
        self.model = model
        several = optimizers if isinstance(optimizers, Iterable) else (optimizers,)
        self.optimizers = tuple(several)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"AppState(optimizers) takes torch.optim.Optimizer objects, not {optimizer!r}"
                )
        self.options = options
        self._as_it_is = False

    def __repr__(self) -> str:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return f"<AppState {type(self.model).__name__} with {kinds or 'no optimizer'}>"

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optim": {"state": {name: ...}, "param_groups": [...]}}``; without
        optimizers there is no ``"optim"``. For stock, which loads only into entries that are there, an
        optimizer without state gets one."""
        with self._no_made_up_state(self._as_it_is and not self._options.flatten_optimizer_state_dict):
            model, optim = get_state_dict(self.model, self.optimizers, options=self.options)
        entries = cast("dict[str, Any]", optim.get("state", {}))
        for name in [name for name, entry in entries.items() if _MARK in entry]:
            del entries[name]
        return {"model": model, "optim": optim} if self.optimizers else {"model": model}

    def _snapshot(self) -> dict[str, Any]:
        """``state_dict()`` for the engine, also that of a subclass: nothing of the run changes."""
        self._as_it_is = True
        try:
            return self.state_dict()
        finally:
            self._as_it_is = False

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand both parts back to torch."""
        options = self._options
        if self.optimizers:
            plain = not (options.flatten_optimizer_state_dict or options.full_state_dict)
            # not strict: a parameter that never got a gradient has no state, which torch takes for a loss
            lenient = dataclasses.replace(options, strict=False)
            with self._no_made_up_state(plain):
                set_optimizer_state_dict(self.model, self.optimizers, state["optim"], options=lenient)
        # last, so that no step for a made-up state can change what was loaded
        set_model_state_dict(self.model, state["model"], options=options)

    @property
    def _options(self) -> StateDictOptions:
        return self.options or StateDictOptions()

    @contextlib.contextmanager
    def _no_made_up_state(self, possible: bool) -> Iterator[None]:
        """Keep torch from making up a state for optimizers that have none: it looks for any entry at all."""
        marked: list[tuple[Optimizer, torch.Tensor]] = []
        # FSDP1 turns entries into flat ones and would trip over a foreign one
        if possible and not any(isinstance(part, FullyShardedDataParallel) for part in self.model.modules()):
            for optimizer in self.optimizers:
                parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
                first = next(parameters, None)
                if first is not None and not optimizer.state:
                    marked.append((optimizer, first))
        for optimizer, parameter in marked:
            optimizer.state[parameter] = {_MARK: 0}
        try:
            yield
        finally:
            for optimizer, parameter in marked:
                if _MARK in optimizer.state.get(parameter, {}):
                    del optimizer.state[parameter]
