"""Imports point one way, modules stay small, and torch's private names are imported where
docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dcp_async

PACKAGE = Path(dcp_async.__file__).parent

GROUND = {"errors", "options", "info", "_foreign", "_activity", "_geometry", "_names"}
"""What any folder may import, but for these themselves and ``trust``."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "options": set(),
    "trust": set(),
    "_activity": set(),
    "_foreign": {"errors"},
    "_geometry": set(),
    "_names": set(),
    "info": {"errors"},
    "_concurrency": {"errors"},
    "response": {"errors", "info", "_concurrency"},
    "events": {"errors", "info", "response"},
    "storage": {*GROUND, "_concurrency"},
    "formats": {*GROUND, "trust"},
    "coordination": {*GROUND, "_concurrency", "trust"},
    "state": {*GROUND, "formats", "trust"},
    "catalog": {*GROUND, "storage", "formats", "trust", "_concurrency"},
    "planning": {*GROUND, "state", "formats", "trust"},
    "load": {*GROUND, "catalog", "coordination", "state", "formats", "trust", "_concurrency"},
    "staging": {*GROUND, "planning", "state", "formats", "_concurrency"},
    "save": {
        *GROUND,
        "staging",
        "planning",
        "coordination",
        "storage",
        "state",
        "formats",
        "events",
        "response",
        "_concurrency",
    },
    "engine": {
        *GROUND,
        "save",
        "load",
        "staging",
        "planning",
        "catalog",
        "coordination",
        "state",
        "storage",
        "formats",
        "trust",
        "events",
        "response",
        "_concurrency",
    },
}
"""By folder. ``sync`` and the package itself may import all."""

PENDING = {
    ("_geometry", "formats"),
    ("catalog", "response"),
    ("load", "response"),
    ("load", "planning"),
    ("planning", "_concurrency"),
    ("planning", "catalog"),
    ("response", "formats"),
    ("state", "staging"),
    ("state", "load"),
    ("storage", "formats"),
    ("storage", "trust"),
}
"""What the move has left to untie."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _folder(name: str) -> str:
    return name.split(".")[0]


def _imports(path: Path) -> set[str]:
    """Modules of the package that ``path`` imports."""
    package = _name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [part for part in package[: len(package) - node.level + 1] if part]
            if node.module:
                found.add(".".join([*base, node.module]))
            else:
                found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_folders_import_what_the_table_allows(path: Path) -> None:
    folder = _folder(_name(path))
    if folder in ("", "sync"):
        return
    for imported in map(_folder, _imports(path)):
        allowed = imported == folder or imported in MAY_IMPORT[folder] or (folder, imported) in PENDING
        assert allowed, f"{_name(path)} imports from {imported}"


def test_imports_have_no_circle() -> None:
    graph = {_name(path): _imports(path) for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_is_of_one_size_with_one_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 520, (
        "past about 500 lines a module holds two subjects: split it"
    )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_queues_are_made_in_pipelines_only(path: Path) -> None:
    makers = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Pipe"
    }
    assert not makers or _name(path) in {"save.pipeline", "load.pipeline"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_environment_variables_are_no_api(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    # WORLD_SIZE is the launcher's, read to refuse what would overwrite other ranks' files
    assert not reads or _name(path) == "coordination.coordinator"
