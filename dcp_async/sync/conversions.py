"""Checkpoints to and from files of ``torch.save``, blocking: the twins of dcp_async.interop's coroutines.

Enters: paths. Leaves: a file, or a checkpoint. Invariant: no logic of its own.
"""

from __future__ import annotations

import os

from .. import interop
from .._concurrency import run_coroutine
from ..trust import Trust


def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike[str],
    torch_save_path: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    budget_bytes: int = 64 << 20,
) -> None:
    """Write a checkpoint as one file of ``torch.save``. See ``dcp_async.interop.dcp_to_torch_save``."""
    run_coroutine(
        interop.dcp_to_torch_save,
        dcp_checkpoint_dir,
        torch_save_path,
        trust=trust,
        budget_bytes=budget_bytes,
    )


def torch_save_to_dcp(
    torch_save_path: str | os.PathLike[str],
    dcp_checkpoint_dir: str | os.PathLike[str],
    *,
    trust: Trust = Trust(),
    budget_bytes: int = 64 << 20,
) -> None:
    """Write a file of ``torch.save`` as a checkpoint. See ``dcp_async.interop.torch_save_to_dcp``."""
    run_coroutine(
        interop.torch_save_to_dcp,
        torch_save_path,
        dcp_checkpoint_dir,
        trust=trust,
        budget_bytes=budget_bytes,
    )
