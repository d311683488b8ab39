"""AppState: a model and its optimizers by canonical names.

Enters: live objects of a trainer. Leaves: one dict of tensors and options, and what a checkpoint held goes
back to just the parameters and groups that it was of. Invariant: files are as torch's ``get_state_dict``
writes them; what does not fit is found before anything is touched.
Source: torch/distributed/checkpoint/state_dict.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _init_optim_state,
    _maybe_full_or_cpu_state_dict,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from . import flat_parameters
from .naming import canonical_names, is_wrapped, parameter_names
from .optimizer_load import load_optimizer
from .optimizer_state import (
    Member,
    OptimizerNames,
    by_number,
    flatten,
    owner_of,
    unflatten,
)


class AppState:
    """A Stateful of a model and its optimizers by canonical names, so that a checkpoint does not depend on
    how the model is wrapped: compiled, DDP, FSDP and activation-checkpointed models share it with the plain
    one.

    Its files are those of torch's ``get_state_dict``, but the optimizers take back exactly what was saved:
    entries of parameters that are frozen by now, groups without parameters, groups in another order, entries
    in their own dtype. What does not fit is named before anything is touched. Nothing is made up for an
    optimizer that has no state yet. Optimizers share one mapping, so a parameter may be in one of them only.

    Args:
        model: the module, wrapped or not.
        optimizers: one or several over its parameters.
        options: torch's ``StateDictOptions``, for both directions. With ``broadcast_from_rank0`` torch's own
            functions load.
    Raises: TypeError for arguments of other types.
    Source: ADR 0019.
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
        self._strict = True
        self._exact = True

    def __repr__(self) -> str:
        kinds = ", ".join(type(optimizer).__name__ for optimizer in self.optimizers)
        return f"<AppState {type(self.model).__name__} with {kinds or 'no optimizer'}>"

    # -- save

    def state_dict(self) -> dict[str, Any]:
        """``{"model": {name: tensor}, "optim": {"state": {name: ...}, "param_groups": [...]}}``; without
        optimizers there is no ``"optim"``. For stock, which loads only into entries that are there, an
        optimizer without state gets one.

        Raises: ValueError for a parameter of an optimizer that is not the model's, and for what a flat
        optimizer state has no place for.
        """
        model = self._model_state()
        return {"model": model, "optim": self._optimizer_state()} if self.optimizers else {"model": model}

    def _snapshot(self) -> dict[str, Any]:
        # an attribute, not a parameter: a subclass may override state_dict() and call this one
        self._as_it_is = True
        try:
            return self.state_dict()
        finally:
            self._as_it_is = False

    @torch.no_grad()
    def _model_state(self) -> dict[str, Any]:
        options = self._options
        if self._is_flat or options.broadcast_from_rank0:
            return get_model_state_dict(self.model, options=options)
        given = self.model.state_dict()
        state: dict[str, Any] = given
        if is_wrapped(self.model):
            names = canonical_names(self.model, given)
            metadata = getattr(given, "_metadata", None)
            state = type(given)((name, given[known]) for name, known in names.items())
            if metadata is not None:
                state._metadata = metadata  # type: ignore[attr-defined]  # as Module.state_dict() leaves it there
        if options.ignore_frozen_params:
            for parameter, (first, *_) in parameter_names(self.model).items():
                if not parameter.requires_grad:
                    state.pop(first, None)
        return _maybe_full_or_cpu_state_dict(state, cast("Any", options))

    @torch.no_grad()
    def _optimizer_state(self) -> dict[str, Any]:
        if not self._as_it_is:
            for optimizer in self.optimizers:
                _init_optim_state(optimizer)
        options = self._options
        names = self._names()
        if self._is_flat:
            state = flat_parameters.optimizer_state(self.model, self.optimizers, options)
        else:
            state = names.state(optimizer.state_dict() for optimizer in self.optimizers)
        if options.flatten_optimizer_state_dict:
            state = flatten(state)
        return _maybe_full_or_cpu_state_dict(state, cast("Any", options))

    # -- load

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each part back what was saved of it.

        Raises: ValueError, before anything is touched, for an optimizer's state that does not fit.
        """
        # before the model: what of the optimizers does not fit is refused while nothing is touched
        if self.optimizers:
            self._load_optimizers(state["optim"])
        self._load_model(state["model"])

    def _restore(self, state: dict[str, Any], *, strict: bool, exact: bool) -> None:
        before = self._strict, self._exact
        self._strict, self._exact = strict, exact
        try:
            self.load_state_dict(state)
        finally:
            self._strict, self._exact = before

    def _load_optimizers(self, saved: Mapping[str, Any]) -> None:
        options = self._options
        if options.broadcast_from_rank0 or not saved:
            lenient = StateDictOptions(**{**vars(options), "strict": False})
            groups = [dict(group) for own in self.optimizers for group in own.param_groups]
            set_optimizer_state_dict(self.model, self.optimizers, dict(saved), options=lenient)
            for group, before in zip(
                (group for own in self.optimizers for group in own.param_groups), groups, strict=True
            ):
                for key, value in before.items():  # an option that was not saved stays as it is
                    group.setdefault(key, value)
            return
        entries = saved.get("state")
        numbered = isinstance(entries, Mapping) and any(isinstance(key, int) for key in entries)
        if numbered and len(self.optimizers) == 1:  # a plain optimizer's own state
            load_optimizer(self.optimizers[0], saved, exact=self._exact)
            return
        names = self._names()
        problems: list[str] = []
        whole = saved if "state" in saved and "param_groups" in saved else unflatten(saved, names, problems)
        assigned, others = names.assign(whole)
        self._refuse([*problems, *others])
        for member, own in zip(names.members, assigned, strict=True):
            if self._is_flat:
                given = flat_parameters.to_load(self.model, member.optimizer, own, options)
            else:
                given = by_number(member, _distributed(member, own))
            load_optimizer(member.optimizer, given, exact=self._exact)

    def _refuse(self, problems: list[str]) -> None:
        if problems and self._strict and self._options.strict:
            raise ValueError(
                f"the optimizers do not fit the checkpoint: {'; '.join(problems[:5])}; nothing was loaded"
            )

    def _load_model(self, saved: Mapping[str, Any]) -> None:
        options = self._options
        if not saved:
            return  # a rank that a full state did not go to
        if options.broadcast_from_rank0 or (options.full_state_dict and not self._is_flat):
            set_model_state_dict(self.model, dict(saved), options=options)
            return
        given = dict(saved)
        if (
            options.ignore_frozen_params and not self._is_flat
        ):  # strict load_state_dict() wants them; they stay as they are
            for parameter, (first, *_) in parameter_names(self.model).items():
                if not parameter.requires_grad:
                    given.setdefault(first, parameter.detach())
        with flat_parameters.context(self.model, options) if self._is_flat else nullcontext():
            if is_wrapped(self.model):
                names = canonical_names(self.model, self.model.state_dict())
                given = {names.get(name, name): value for name, value in given.items()}
            whole = OrderedDict(given)
            if (metadata := getattr(saved, "_metadata", None)) is not None:  # the versions of its modules
                whole._metadata = metadata  # type: ignore[attr-defined]  # where Module.state_dict() puts it
            self.model.load_state_dict(whole, strict=options.strict and self._strict)

    # -- what a load asks before it touches anything

    @property
    def entries_at(self) -> str:
        """Where in ``state_dict()`` the mapping lies that grows with the optimizers' history."""
        return "optim" if self._options.flatten_optimizer_state_dict else "optim.state"

    def taker(self) -> Callable[[Any, bool], bool]:
        """Says whether the mapping at ``entries_at`` has a place for what was saved as some key, told whether
        that was a parameter's name: there is none for the entries of another stage of a pipeline, nor for
        those of parameters that are gone."""
        known = self._names().known()
        if self._options.flatten_optimizer_state_dict:
            return lambda key, _: isinstance(key, str) and owner_of(key, known) is not None
        # an optimizer may keep something of its own beside its parameters' entries
        single = len(self.optimizers) == 1
        own = set(self.optimizers[0].state) if single else set()
        return lambda key, was_parameter: (
            key in known
            or key in own
            or not isinstance(key, str)
            or (single and not was_parameter and "." not in key)
        )

    @property
    def _options(self) -> StateDictOptions:
        return self.options or StateDictOptions()

    @property
    def _is_flat(self) -> bool:
        """Whether FSDP1 is in it, which alone can tell flat parameters apart."""
        return any(isinstance(part, FullyShardedDataParallel) for part in self.model.modules())

    def _names(self) -> OptimizerNames:
        model = f"model ({type(self.model).__name__})"
        if self._is_flat:
            return OptimizerNames.of_flat(self.optimizers, flat_parameters.parameter_names(self.model), model)
        return OptimizerNames(self.optimizers, parameter_names(self.model), model)


def _distributed(member: Member, named: Mapping[str, Any]) -> dict[str, Any]:
    """``named``, with whole tensors cut as their distributed parameters are."""
    parameters = {
        name: parameter
        for group, of_group in zip(member.groups, member.optimizer.param_groups, strict=True)
        for (name, *_), parameter in zip(group, of_group["params"], strict=True)
        if isinstance(parameter, DTensor)
    }
    if not parameters:
        return dict(named)

    def cut(value: Any, like: DTensor) -> Any:
        # a step count is no part of the parameter, and stays whole
        if type(value) is torch.Tensor and value.shape == like.shape and value.dim():
            mesh, placements = like.device_mesh, like.placements
            # src_data_rank=None: each rank has the whole and cuts its own; no collective runs
            return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
        return value

    state = {
        key: {inner: cut(value, parameters[key]) for inner, value in entry.items()}
        if key in parameters and isinstance(entry, dict)
        else entry
        for key, entry in named["state"].items()
    }
    return {**named, "state": state}


def check_before_touch(
    state: AppState, entries: Iterable[str], groups: Iterable[Mapping[str, Any]]
) -> list[str]:
    """What of an optimizer state does not fit ``state``, in words; nothing is touched.

    Args:
        entries: keys of what was saved at ``state.entries_at``.
        groups: the groups' options as far as they are known, ``"params"`` among them; not of a flat state.
    """
    if not state.optimizers or not state._options.strict or state._options.broadcast_from_rank0:
        return []
    names = state._names()
    problems: list[str] = []
    if state._options.flatten_optimizer_state_dict:
        takes = state.taker()
        # in a flat state, options of what is gone lie among those of what is here
        ours = (key for key in entries if takes(key, False))
        unflatten({key: None for key in ours if key.startswith("param_groups.")}, names, problems)
        return problems
    _, others = names.assign({"state": dict.fromkeys(entries), "param_groups": list(groups)})
    return [*problems, *others]


def snapshot_of_app(app: AppState) -> dict[str, Any]:
    """``state_dict()`` for the engine, also that of a subclass: nothing of the run changes."""
    return app._snapshot()


def restore_app(app: AppState, state: dict[str, Any], *, strict: bool, exact: bool) -> None:
    """``load_state_dict()`` for the engine, also that of a subclass.

    Args:
        strict: whether what does not fit is an error; else the rest is loaded.
        exact: whether an entry keeps its saved dtype where its parameter has another.
    """
    app._restore(state, strict=strict, exact=exact)
