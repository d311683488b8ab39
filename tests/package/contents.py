"""Checks what an sdist and a wheel hold: `contents.py SDIST WHEEL`; an AssertionError names the file."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = {
    *("dcp_async", "tests", "examples", "bench", "docs"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *("PKG-INFO", "constraints.txt", "noxfile.py", "pyproject.toml", ".gitignore"),
}


def check_sdist(path: Path) -> None:
    """All that building, testing and documenting take."""
    with tarfile.open(path) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    assert {name.split("/")[0] for name in names} == TOP
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "dcp_async").rglob("*.py")}
    assert sources <= {*names}, sources - {*names}
    assert {"tests/conftest.py", "docs/index.md", "docs/conf.py"} <= {*names}


def check_wheel(path: Path) -> None:
    """The package and its metadata, and nothing else."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    information = f"{'-'.join(path.name.split('-')[:2])}.dist-info"
    package = {str(file.relative_to(ROOT)) for file in (ROOT / "dcp_async").rglob("*.py")}
    metadata = {f"{information}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert {*names} == {*package, "dcp_async/py.typed", *metadata}, {*names} ^ {*package, *metadata}


if __name__ == "__main__":
    check_sdist(Path(sys.argv[1]))
    check_wheel(Path(sys.argv[2]))
