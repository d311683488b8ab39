"""The bench's imports point one way, and a report can be made without what only measuring needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bench

PACKAGE = Path(bench.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT: dict[str, set[str]] = {
    "engines": set(),
    "measuring": {"engines"},
    "reporting": {"engines", "measuring"},
    "cli": {"measuring"},
    "packages": set(),
}
"""By folder; the entry points beside them may import all of these, and no other entry point."""
FACES = ("bench.engines", "bench.measuring", "bench.reporting", "bench.measuring.planning")
HEAVY = ("torch", "dcp_async", "matplotlib")
"""A process imports the engine that it measures and no other, and a report needs none."""


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path): path for path in MODULES}


def imports(name: str) -> set[str]:
    """Modules of the bench that ``name`` imports, wherever in its text."""
    path = NAMES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(
                [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            )
            # `from . import x` names a module, `from .x import y` something in one
            inner = {f"{base}.{alias.name}" for alias in node.names} & NAMES.keys()
            imported |= inner or {base}
    return imported - {name}


def folder(name: str) -> str:
    return name.split(".")[1]


def test_imports_have_no_circle() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in imports(name):
                visit(imported, (*above, name))
            done.add(name)

    for name in NAMES:
        visit(name, ())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bench"])
def test_folders_import_faces_of_the_folders_below(name: str) -> None:
    own = folder(name)
    outside = {imported for imported in imports(name) if folder(imported) != own}
    assert {folder(imported) for imported in outside} <= MAY_IMPORT.get(own, MAY_IMPORT.keys())
    assert outside <= {*FACES, "bench.cli", "bench.packages"}, "an inner module of another folder"


def test_faces_list_what_they_export() -> None:
    for face in FACES:
        names = {
            node.id for node in ast.walk(ast.parse(NAMES[face].read_text())) if isinstance(node, ast.Name)
        }
        assert "__all__" in names, face


def test_a_report_needs_no_torch_no_engine_and_no_matplotlib() -> None:
    code = f"import sys, bench.report; print(*sorted(sys.modules.keys() & set({HEAVY})))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_modules_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 50, f"{path.name}: {node.name}"
