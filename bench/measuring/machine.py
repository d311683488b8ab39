"""What a reader needs to place the numbers: the machine, the file system, the load at the start."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any


def machine_facts(directory: Path) -> dict[str, Any]:
    """The machine, and the kind of file system that holds `directory`; no names, no paths."""
    model = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[0] if model else platform.machine(),
        "memory_bytes": _memory_bytes("MemTotal"),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "file_system": file_system(directory),
        "transparent_hugepages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def file_system(directory: Path) -> str:
    """The type of the file system that holds `directory`."""
    device = directory.resolve().stat().st_dev
    seen = "unknown"
    # Later mounts hide earlier ones: the last line with this device is the one that is seen.
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, kind = line.split(" - ", 1)
        major, minor = fields.split()[2].split(":")
        if os.makedev(int(major), int(minor)) == device:
            seen = kind.split()[0]
    return seen


def memory_available() -> int:
    """Bytes that the kernel says can be had without swapping."""
    return _memory_bytes("MemAvailable")


def _memory_bytes(field: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {field}: these benches need Linux")


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
