"""Statefuls that we offer, and what counts as one.

Enters: live objects of a trainer. Leaves: plain dicts of tensors and leaves by ``state_dict()``, and what
``load_state_dict()`` puts back. Each is an ordinary DCP Stateful: stock's save and load take them too.
Source: torch/distributed/checkpoint/stateful.py.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .optimizers import AppState, snapshot_of_app

logger = logging.getLogger(__name__)

__all__ = ["AppState", "FromRank", "PerRank", "RNGState", "is_stateful", "snapshot_of_ours"]


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
    def key(rank: int | str) -> str:
        """The name that a rank's own lies under."""
        return f"rank_{rank}"


class FromRank:
    """Marks what one rank has for all: that rank's value is saved, and every rank loads it. A counter that
    one rank keeps, the statistics that it gathered, the state of a scheduler that it alone steps.

    It has the name that ``value`` would have by itself. The other ranks' values are neither asked for their
    state nor compared, so what runs collectives in its ``state_dict()`` can't stand in it, nor can DTensors,
    which all ranks hold together, or PerRank.

    Args:
        value: on each rank a Stateful, a tensor, a container or a picklable value; what is loaded takes its
            place or fills it, as it would without this.
        rank: the rank whose value is saved, alike on all. A load does not mind it: a checkpoint may be loaded
            by any number of ranks.
    """

    def __init__(self, value: Any, rank: int = 0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank={rank!r} must be an integer, not {type(rank).__name__}")
        if rank < 0:
            raise ValueError(f"rank={rank} must not be negative")
        self.value = value
        self.rank = rank

    def __repr__(self) -> str:
        return f"FromRank({self.value!r}, {self.rank})"


class RNGState:
    """A Stateful that brings the random number generators back to where they were: torch's, Python's,
    numpy's if it is used, and those of all devices of the accelerator once it is initialised.

    When a checkpoint is loaded, the current device's takes what the current device's was; each other device's
    takes that of its number, or stays as it is if the process that saved had fewer.

    Each rank's are its own, as if it stood in ``PerRank``. When a checkpoint of another world size is loaded,
    a rank takes what the rank of its number had saved; one that had no counterpart keeps its generators as
    they are and logs a warning, unless ``PerRank(RNGState(), on_resize=...)`` says what it takes.
    """

    def state_dict(self) -> dict[str, Any]:
        """``{"rank_0": {"torch": ..., "python": ...}}`` on rank 0, for stock: the engine's names are the
        same."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return {PerRank.key(rank): self._snapshot()}

    def _snapshot(self) -> dict[str, Any]:
        """This process's generators, for the engine, which knows its rank."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        # not imported for this: before somebody imports it nobody draws from it
        if "numpy" in sys.modules:
            state["numpy"] = sys.modules["numpy"].random.get_state()
        return state | _device_generators()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what ``state_dict()`` gave, or one rank's part of it."""
        # by ranks: stock hands over what state_dict() gave, the engine one rank's part
        if "torch" not in state:
            (own,) = self.state_dict()
            # what one rank alone saved is for whoever loads it
            if own not in state and len(state) != 1:
                raise ValueError(f"RNGState.load_state_dict(): nothing was saved for {own}")
            state = state[own] if own in state else next(iter(state.values()))
        # generators take CPU tensors alone, wherever a load has put these
        torch.set_rng_state(state["torch"].cpu())
        random.setstate(state["python"])
        if "numpy" in state and "numpy" in sys.modules:
            sys.modules["numpy"].random.set_state(state["numpy"])
        if "accelerator" in state and torch.accelerator.is_available():
            _set_device_generators(state["accelerator"], state.get("accelerators", []))


def _device_generators() -> dict[str, Any]:
    """The current device's by itself, as all releases save it, and a list of all if there are several."""
    if not torch.accelerator.is_available():
        return {}
    module = torch.get_device_module()
    # asked for its generator it would be initialised; nobody has drawn from one that is not. MPS, which is
    # always, has no such question
    if hasattr(module, "is_initialized") and not module.is_initialized():
        return {}
    state: dict[str, Any] = {"accelerator": module.get_rng_state()}
    if (count := torch.accelerator.device_count()) > 1:
        state["accelerators"] = [module.get_rng_state(index) for index in range(count)]
    return state


def _set_device_generators(current: torch.Tensor, every: list[torch.Tensor]) -> None:
    """``every`` is empty where only one device's was saved."""
    module, count = torch.get_device_module(), torch.accelerator.device_count()
    for index, state in enumerate(every[:count]):
        module.set_rng_state(state.cpu(), index)
    if 0 < len(every) < count:
        logger.warning(
            "RNGState: the checkpoint has generators of %d devices; those from %d on stay as they are",
            *(len(every), len(every)),
        )
    # last, and by no number: which one is current may differ, and a device that was not initialised yet takes
    # it when it is
    module.set_rng_state(current.cpu())


def snapshot_of_ours(stateful: AppState | RNGState) -> Any:
    """What the engine saves of a Stateful that we offer, or of a subclass, which may give anything."""
    return stateful._snapshot() if isinstance(stateful, RNGState) else snapshot_of_app(stateful)
