"""Packages for a machine that has torch and no network: a folder that is filled elsewhere and brought along.

Enters: the Python version there. Leaves: `.nox/gpu-py3.N`, which git ignores, and the names of what an
interpreter lacks. Nothing is installed where it is used, and torch is never in it: an accelerator's machine
has its own. Needs nothing but Python, and pip where the folder is filled.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE: Mapping[str, str] = {"torch": "torch", "anyio": "anyio", "aiofiles": "aiofiles", "xxhash": "xxhash"}
"""What the package imports, by module: the names of their distributions."""
TESTS: Mapping[str, str] = {
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
    "pytest_timeout": "pytest-timeout",
}
"""What the tests need besides."""
WELCOME = ("uvloop",)
"""What the package does without."""


def folder(version: str = f"{sys.version_info.major}.{sys.version_info.minor}") -> Path:
    """Where the packages for that Python lie: each version has compiled ones of its own."""
    return ROOT / ".nox" / f"gpu-py{version}"


def fill(version: str) -> Path:
    """Fetch the packages for that Python on a machine like this one into its folder, which is made anew."""
    target = folder(version)
    shutil.rmtree(target, ignore_errors=True)
    wanted = [name for name in (*ENGINE.values(), *TESTS.values(), *WELCOME) if name != "torch"]
    tags = [f"{tag}_{platform.machine()}" for tag in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    command = [
        *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--target", str(target)),
        *("--only-binary=:all:", "--implementation=cp", f"--python-version={version}"),
        *(f"--platform={tag}" for tag in tags),
        *("-c", str(ROOT / "constraints.txt"), *wanted),
    ]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"could not fetch the packages for Python {version}: {' '.join(command)}")
    return target


def add_to_path() -> None:
    """Let this process, and those it starts, find the packages of its version's folder, if there is one."""
    if (path := folder()).is_dir() and str(path) not in sys.path:
        sys.path.insert(0, str(path))
        below = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), below)))


def missing(modules: Iterable[str]) -> list[str]:
    """Those of the modules that this interpreter does not find."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def require(needed: Mapping[str, str]) -> None:
    """Find the packages of the folder, or end the program with what is missing and how to get it."""
    add_to_path()
    if not (lacking := missing(needed)):
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = " ".join(needed[module] for module in lacking)
    raise SystemExit(
        f"{sys.executable} (Python {version}) lacks {names}. Install that, or, where there is no network, "
        f"run `python3 noxfile.py gpu --prepare {version}` in this tree on a machine that has one (Linux, "
        f"{platform.machine()}) and bring {folder().relative_to(ROOT)} along with the tree. torch is never "
        "fetched: it has to be that of the accelerator's machine."
    )
