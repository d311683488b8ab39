"""Saves and loads a state in a process of its own and prints on which devices that made a CUDA context.

`contexts.py DIRECTORY host` has a state of host memory; `contexts.py DIRECTORY INDEX` one on that device,
which is the current one of the main thread, as `torch.cuda.set_device(local_rank)` leaves it.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from dcp_async import sync


def active() -> list[int]:
    """Devices with a primary context."""
    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuInit(0) == 0
    indices = []
    for index in range(torch.cuda.device_count()):
        flags, is_active = ctypes.c_uint(), ctypes.c_int()
        assert driver.cuDevicePrimaryCtxGetState(index, ctypes.byref(flags), ctypes.byref(is_active)) == 0
        if is_active.value:
            indices.append(index)
    return indices


def main(root: str, where: str) -> None:
    device = torch.device("cpu")
    if where != "host":
        device = torch.device("cuda", int(where))
        torch.cuda.set_device(device)
    state = {"w": torch.ones(1 << 20, device=device), "small": torch.ones(3, device=device)}
    with sync.CheckpointEngine(root) as engine:
        engine.save(state).upload_completion.result()
        engine.load(state)
        engine.load(state, atomic=True)
        engine.read(device=device)
    # asked before the engine's memory has to be gone: its finalisers run at the end of the process
    sys.stdout.write(" ".join(map(str, active())))


if __name__ == "__main__":
    main(*sys.argv[1:])
