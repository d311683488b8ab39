"""A machine without a network is told what it lacks, and finds what was brought along for its Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import packages


@pytest.fixture
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")


def test_what_an_interpreter_lacks_is_said_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_path: None
) -> None:
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"lacks no-such-thing\..* noxfile.py gpu --prepare 3\.\d+"):
        packages.require({"os": "os", "no_such_module": "no-such-thing"})


def test_packages_that_were_brought_along_are_found_here_and_by_processes_below(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_path: None
) -> None:
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    packages.folder().mkdir(parents=True)
    (packages.folder() / "brought_along.py").touch()
    packages.require({"brought_along": "brought-along"})
    assert packages.folder() == Path(os.environ["PYTHONPATH"])
    subprocess.run([sys.executable, "-c", "import brought_along"], check=True)


def test_the_tests_of_devices_start_with_no_nox_and_no_environment() -> None:
    arguments = ("gpu", "--device", "cpu", "--collect-only", "-q")
    collected = subprocess.run(
        [sys.executable, str(packages.ROOT / "noxfile.py"), *arguments],
        env={"PATH": "", "PYTHONPATH": str(packages.ROOT)},
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stderr
    assert "tests/gpu/test_backend_contract.py::" in collected.stdout
    assert "installing" not in collected.stderr


def test_each_python_has_a_folder_of_its_own_that_git_ignores() -> None:
    assert packages.folder("3.12") != packages.folder("3.13")
    ignored = (packages.ROOT / ".gitignore").read_text().splitlines()
    assert f"/{packages.folder('3.12').relative_to(packages.ROOT).parts[0]}/" in ignored
