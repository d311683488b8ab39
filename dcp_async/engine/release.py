"""Which versions of torch this release was tested with, and what it asks of any newer one.

Enters: torch's version. Leaves: nothing, or a warning and a proof in memory, or EngineStateError. Invariant:
a torch that nobody could test with can't make a run lose its checkpoints: it shows before the first save that
what is written can be read. Source: docs/adr/0014.
"""

from __future__ import annotations

import io
import logging
import re
from functools import lru_cache
from operator import is_
from typing import Any

import torch

from ..errors import EngineStateError
from ..formats import PLAIN_DTYPES
from ..planning import DefaultDraft, compile_plan, make_local_plan, prove_item
from ..state import capture
from ..trust import Trust, load_item

logger = logging.getLogger(__name__)

OLDEST = (2, 11)
"""The floor in pyproject.toml."""
NEWEST = (2, 15)
"""The newest one that `nox -s compat` has passed with."""
_UID = "0" * 16


def check_torch() -> None:
    """On a torch that is newer than the tested ones: see that a small state reads back, and say so once.

    Raises: EngineStateError.
    """
    if _is_newer(torch.__version__):
        _check_newer(torch.__version__)


def _is_newer(version: str) -> bool:
    """Whether the release is, whatever is built of it: nightlies and local builds count as what they are to
    become."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    # a version that can't be read is taken for a newer one: that costs a proof, the other might cost a run
    return numbers is None or (int(numbers[1]), int(numbers[2])) > NEWEST


@lru_cache(maxsize=1)
def _check_newer(version: str) -> None:
    tested = f"torch {_text(OLDEST)} to {_text(NEWEST)}"
    try:
        prove_small_state()
    except Exception as error:
        raise EngineStateError(
            f"this release of dcp_async was tested with {tested}, and with torch {version} a small state "
            f"that was saved in memory does not read back ({type(error).__name__}: {error}). "
            f"Nothing was written. Install torch<{NEWEST[0]}.{NEWEST[1] + 1}, or a newer dcp_async"
        ) from error
    # only where it works: a refusal says the same, and is raised
    logger.warning(
        "this release of dcp_async was tested with %s, and this is torch %s: every save still proves that it "
        "can be read before it is published; look for a newer dcp_async",
        tested,
        version,
    )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def prove_small_state() -> None:
    """Capture, plan and encode a state of all that torch's own code has a part in, and read it back; no file
    is written. Raises whatever does not work."""
    weight = torch.arange(6.0, device="cpu").reshape(2, 3)
    state: dict[str, Any] = {
        "model": {"weight": torch.nn.Parameter(weight.clone()), "tied": weight, "bias": weight[0].bfloat16()},
        "optim": {
            "state": {0: {"step": torch.tensor(3.0, device="cpu")}},
            "param_groups": [{"lr": 0.5, "params": [0]}],
        },
        "list": [weight.t(), {"deep": 1}],
        "sparse": weight.to_sparse(),
        "epoch": 3,
    }
    captured = capture(state, None)
    draft = DefaultDraft(make_local_plan(captured, None))
    (answer,), plan = draft.merge([draft.message])
    compiled, locations = compile_plan(captured, draft.local_plan, draft.assigned(answer), _UID, plan)
    plan.locate(0, locations)
    plan.publication()
    for dtype in PLAIN_DTYPES:
        prove_item(dtype, 2)
    structure = captured.structure
    leaves = zip(structure.leaf_names, compiled.padded(captured.leaf_items), strict=True)
    for name, item in leaves:
        meant, read = captured.live[name], load_item(io.BytesIO(item), Trust())
        if isinstance(meant, torch.Tensor):
            meant, read = meant.to_dense().tolist(), read.to_dense().tolist()
        if read != meant:
            raise ValueError(f"{name} was saved as {meant!r} and reads as {read!r}")
    # the guards that know a state again are private to torch, and may change with any release
    again = capture(state, captured.known)
    if again.is_new or not all(map(is_, again.tensors, captured.tensors)):
        raise ValueError("the same state is not known again")
