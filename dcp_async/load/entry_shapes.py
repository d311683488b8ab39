"""Whether what an optimizer kept for a parameter fits the parameter as it is now.

Enters: an optimizer's mapping, what lies in a checkpoint, a state's tensors. Leaves: a reason, in words.
Invariant: no false refusals. In an AppState the parameter itself was saved and tells; of a bare optimizer
only classes of torch.optim are judged, by entries that they always make like their parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from ..formats import text_of
from ..state import OptimizerState, Targets, global_size

_LIKE_PARAMETERS = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"}
    | {"acc_delta", "sum", "prev", "step_size", "ax"}
)
"""What torch.optim's classes keep in their parameter's shape."""


def misfit(
    mapping: OptimizerState,
    targets: Targets,
    names: Mapping[str, TensorStorageMetadata | BytesStorageMetadata],
    key: Any,
    leaves: Iterable[str],
) -> str | None:
    """Why the entry that was saved as ``key``, with ``leaves`` of these names, is of another parameter than
    the state has."""
    if mapping.model is not None:
        return _misfit_of_named(f"{mapping.model}.", targets, names, text_of(key))
    if (size := mapping.sizes.get(text_of(key))) is None:
        return None
    for name in leaves:
        meta = names[name]
        if name.rpartition(".")[2] not in _LIKE_PARAMETERS or not isinstance(meta, TensorStorageMetadata):
            continue
        if len(meta.size) == len(size) and meta.size != size:
            return _reason(size, meta.size)
    return None


def _misfit_of_named(
    inside: str,
    targets: Targets,
    names: Mapping[str, TensorStorageMetadata | BytesStorageMetadata],
    key: str,
) -> str | None:
    parameter = key
    if f"{inside}{key}" not in targets.tensors and key.startswith("state."):  # flat: state.<name>.<entry>
        parameter = key.removeprefix("state.").rpartition(".")[0]
        # names of parameters and of entries may both have dots: the longest that the state knows is it
        while parameter and f"{inside}{parameter}" not in targets.tensors:
            parameter = parameter.rpartition(".")[0]
    name = f"{inside}{parameter}"
    tensor, meta = targets.tensors.get(name), names.get(name)
    if tensor is None or name in targets.wholes or not isinstance(meta, TensorStorageMetadata):
        return None  # nobody's, or one that becomes what was saved
    size = global_size(tensor)
    return None if size == meta.size else _reason(size, meta.size)


def _reason(present: Iterable[int], saved: Iterable[int]) -> str:
    return f"is of a parameter that is {tuple(present)} in the state, {tuple(saved)} in the checkpoint"
