"""States have the sizes and the bits that they should; a process measures the package that it is led to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import against, measuring
from bench.measuring import processes, workloads


def test_reason_of_a_failure_has_no_path() -> None:
    text = "Traceback\n  File ...\nFileNotFoundError: [Errno 2] No such file: '/home/somebody/ck/step-1'\n"
    assert measuring.short_reason(text) == "FileNotFoundError: [Errno 2] No such file: 'step-1'"


@pytest.mark.parametrize("name", ["many", "mixed"])
def test_state_bytes_are_those_of_the_state(name: str) -> None:
    scale = 0.01 if name == "many" else 0.25
    made = workloads.build(name, scale)
    assert made.nbytes == pytest.approx(measuring.STATE_BYTES[name] * scale)


def test_one_changed_bit_is_a_difference() -> None:
    made = workloads.build("mixed", 0.004)
    assert workloads.num_different(made.tensors) == 0
    made.tensors[9].view(-1)[3] *= 1.01
    assert workloads.num_different(made.tensors) == 1


def test_a_process_has_the_package_of_its_tree_and_this_bench(tmp_path: Path) -> None:
    (tmp_path / "dcp_async").mkdir()
    (tmp_path / "dcp_async" / "__init__.py").touch()
    interpreter, *options, module, _ = processes.command("worker", {})
    assert (interpreter, module) == (sys.executable, "bench.measuring.worker")
    code = "import bench, dcp_async; print(bench.__file__); print(dcp_async.__file__)"
    answer = subprocess.run(
        [interpreter, *options[:-1], "-c", code],
        env=processes.environment(tmp_path),
        cwd=processes.ROOT,  # which has both, and must not come first
        capture_output=True,
        text=True,
        check=True,
    )
    own = [str(processes.ROOT / "bench" / "__init__.py"), str(tmp_path / "dcp_async" / "__init__.py")]
    assert answer.stdout.splitlines() == own


def test_only_the_package_of_a_revision_is_checked_out(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    for name in ("dcp_async", "bench"):
        (repository / name).mkdir(parents=True)
        (repository / name / "__init__.py").touch()
    author = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "both")):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True)
    tree = against.check_out("HEAD", tmp_path, repository=repository)
    assert [path.relative_to(tree).as_posix() for path in tree.rglob("*.py")] == ["dcp_async/__init__.py"]
