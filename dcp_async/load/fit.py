"""What must fit before the first byte of a state is touched, and what of it stays as it is.

Enters: Targets, a Match, and the leaves that were read first. Leaves: nothing, or IncompatibleStateError that
names what does not fit. Pure: no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..catalog import Contents
from ..errors import IncompatibleStateError
from ..formats import children_of, subtree, text_of
from ..state import AppState, Targets, check_before_touch
from .match import Match


def check_groups(targets: Targets, values: Mapping[str, Any], checkpoint_id: str) -> None:
    """Optimizers refuse groups of other sizes, but only when all is read. Raises IncompatibleStateError."""
    for prefix, stateful, _ in targets.flat.statefuls:
        if isinstance(stateful, torch.optim.Optimizer):
            for number, group in enumerate(stateful.param_groups):
                name = f"{prefix}.param_groups.{number}.params"
                saved = values.get(name)
                if isinstance(saved, list) and len(saved) != len(group["params"]):
                    raise IncompatibleStateError(
                        f"checkpoint {checkpoint_id!r} does not fit the state ({prefix}: group {number} "
                        f"has {len(group['params'])} parameters, {len(saved)} in the checkpoint); "
                        "nothing was loaded",
                        checkpoint_id=checkpoint_id,
                    )


def check_app_states(targets: Targets, contents: Contents, values: Mapping[str, Any]) -> None:
    """What was saved of an AppState's optimizers must fit, parameter by parameter and group by group. Raises
    IncompatibleStateError."""
    for prefix, stateful, _ in targets.flat.statefuls:
        if not isinstance(stateful, AppState):
            continue
        structure, checkpoint_id = contents.structure, contents.info.checkpoint_id
        entries = [key for key, _ in children_of(subtree(structure, f"{prefix}.{stateful.entries_at}"))]
        saved_groups = children_of(subtree(structure, f"{prefix}.optim.param_groups"))
        params = [
            values.get(f"{prefix}.optim.param_groups.{number}.params")
            for number, _ in enumerate(saved_groups)
        ]
        if not (entries or params) or not all(isinstance(names, list) for names in params):
            continue  # a subclass saves something else, or names alone have told that groups are missing
        groups = [{"params": names} for names in params]
        if problems := check_before_touch(stateful, entries, groups):
            raise IncompatibleStateError(
                f"checkpoint {checkpoint_id!r} does not fit the state ({prefix}: {'; '.join(problems[:5])}); "
                "nothing was loaded. Build the optimizers as they were, or pass strict=False to load what "
                "fits",
                checkpoint_id=checkpoint_id,
            )


def kept_options(targets: Targets, contents: Contents, values: Mapping[str, Any]) -> list[str]:
    """Names of the options in AppStates' groups that stay as they are, since the group was saved without."""
    kept = []
    for prefix, groups in targets.named_groups.items():
        saved = {
            frozenset(params): {key for key, _ in children_of(node)}
            for number, node in children_of(subtree(contents.structure, prefix))
            if isinstance(params := values.get(f"{prefix}.{number}.params"), list)
        }
        for number, group in enumerate(groups):
            params = group.get("params") if isinstance(group, Mapping) else None
            # groups are found by their parameters: numbers change when groups do
            if isinstance(params, list) and (options := saved.get(frozenset(params))) is not None:
                kept += [f"{prefix}.{number}.{text_of(key)}" for key in group if key not in options]
    return kept


def check_fit(
    match: Match, checkpoint_id: str, *, unexpected: Sequence[str], lenient: str = "strict=False"
) -> None:
    """Raises IncompatibleStateError unless everything fits.

    Args:
        unexpected: what is only in the checkpoint and counts.
        lenient: what the caller passes for a load of what fits.
    """
    problems = []
    for what, names in (("missing in the checkpoint", match.missing), ("not in the state", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{what}: {', '.join(names[:5])}{more}")
    if match.mismatched:
        more = f" and {len(match.reasons) - 5} more" if len(match.reasons) > 5 else ""
        problems.append("; ".join(match.reasons[:5]) + more)
    if problems:
        convert = (
            "pass dtypes='convert' to convert where only the dtype differs, " if match.convertible else ""
        )
        raise IncompatibleStateError(
            f"checkpoint {checkpoint_id!r} does not fit the state ({'; '.join(problems)}); nothing was "
            f"loaded. Fix the state, {convert}or pass {lenient} to load what fits",
            checkpoint_id=checkpoint_id,
        )
