"""What one call to the rendezvous store costs: a message is made of a few."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch.distributed as dist

from .clock import Times


def store_seconds() -> Times:
    """Median seconds of each call to a TCPStore on this machine, by wall clock."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    mebibyte = bytes(1 << 20)
    spans: dict[str, list[float]] = {"set": [], "get": [], "delete": [], "add": [], "set 1 MiB": []}

    def take(call: str, fn: Callable[..., object], *args: object) -> None:
        start = time.perf_counter()
        fn(*args)
        spans[call].append(time.perf_counter() - start)

    for number in range(1000):
        take("set", client.set, f"key/{number}", b"m")
        take("get", client.get, f"key/{number}")
        take("delete", client.delete_key, f"key/{number}")
        take("add", client.add, "count", 1)
    for _ in range(50):
        take("set 1 MiB", client.set, "large", mebibyte)
    return {call: statistics.median(seconds) for call, seconds in spans.items()}
