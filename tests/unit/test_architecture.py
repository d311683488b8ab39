"""Imports point one way, folders are entered by their faces, and some of them know neither loops nor threads.

What a module may touch of another one's objects, and of torch's, is in `test_house_rules.py`.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import dcp_async
from tests.support import lazy_faces

PACKAGE = Path(dcp_async.__file__).parent

GROUND = {"errors", "options", "info", "_foreign", "_geometry", "_lazy", "_names"}
"""What any folder may import, but for these themselves and ``trust``."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "options": set(),
    "trust": set(),
    "_foreign": {"errors"},
    "_geometry": set(),
    "_lazy": set(),
    "_names": set(),
    "info": {"errors"},
    "_concurrency": {"errors"},
    "response": {"errors", "info", "_concurrency"},
    "events": {"errors", "info", "response"},
    "storage": {*GROUND, "_concurrency"},
    "formats": {*GROUND, "trust"},
    "coordination": {*GROUND, "_concurrency", "trust"},
    "schedule": {*GROUND, "coordination", "response", "_concurrency"},
    "state": {*GROUND, "formats", "trust"},
    "catalog": {*GROUND, "storage", "formats", "trust", "_concurrency"},
    "planning": {*GROUND, "state", "formats", "trust"},
    "load": {*GROUND, "catalog", "coordination", "state", "formats", "staging", "trust", "_concurrency"},
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
        "schedule",
        "state",
        "storage",
        "formats",
        "trust",
        "events",
        "response",
        "_concurrency",
    },
    "cli": {*GROUND, "catalog", "storage", "formats", "engine", "interop", "trust", "_concurrency"},
    "__main__": {"cli"},
    "testing": {*GROUND, "storage"},
    "functional": {*GROUND, "engine", "interop", "coordination", "response", "trust", "_concurrency"},
    "interop": {
        *GROUND,
        "engine",
        "events",
        "coordination",
        "response",
        "save",
        "load",
        "staging",
        "planning",
        "catalog",
        "state",
        "storage",
        "formats",
        "trust",
        "_concurrency",
    },
}
"""By folder. ``sync`` and the package itself may import all."""


MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


FOLDERS = {".".join(path.parent.relative_to(PACKAGE).parts) for path in MODULES} - {""}
PURE = {"planning", "formats", "state", "_geometry", "trust"}


def _is_pure(name: str) -> bool:
    return name.split(".")[0] in PURE


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
        allowed = imported == folder or imported in MAY_IMPORT[folder]
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
def test_folders_are_entered_by_their_faces(path: Path) -> None:
    """Across folders nobody imports from an inner file: what a folder gives is what its face lists."""
    name = _name(path)
    inner = [
        imported
        for imported in _imports(path)
        for folder in FOLDERS
        if imported.startswith(f"{folder}.")
        and imported not in FOLDERS
        and not name.startswith(f"{folder}.")
        and name != folder
    ]
    assert inner == []


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_face_says_what_the_folder_is_for_and_lists_what_it_gives(folder: str) -> None:
    face = importlib.import_module(f"dcp_async.{folder}")
    assert face.__doc__
    assert face.__doc__.count("\n") == 0, "a sentence"
    assert face.__all__
    assert all(hasattr(face, name) and not name.startswith("_") for name in face.__all__)


@pytest.mark.parametrize("path", [path for path in MODULES if _is_pure(_name(path))], ids=_name)
def test_pure_folders_know_neither_loops_nor_threads(path: Path) -> None:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add((node.module or "").split(".")[0])
    assert not modules & {"asyncio", "anyio", "threading"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_queues_are_made_in_pipelines_only(path: Path) -> None:
    makers = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Pipe"
    }
    assert not makers or _name(path) in {"save.pipeline", "save.items_pipeline", "load.pipeline"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_environment_variables_are_no_api(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    # WORLD_SIZE is the launcher's, read to refuse what would overwrite other ranks' files; AWS_ENDPOINT_URL
    # is obstore's, which does not tell whether what it names is asked without TLS; NO_COLOR is its user's
    readers = {"coordination.coordinator", "storage.object_store.options", "cli.terminal"}
    assert not reads or _name(path) in readers


@pytest.mark.parametrize("face", lazy_faces.faces(), ids=_name)
def test_a_lazy_face_gives_what_its_imports_say(face: Path) -> None:
    """Again: python -m tests.support.lazy_faces."""
    given = {module: set(names.split()) for module, names in lazy_faces.mapping_of(face).items() if names}
    at_once = lazy_faces.at_once(face)
    assert given | at_once == lazy_faces.imports_of(face)
    now = [node for node in ast.parse(face.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in now if node.level} == {"_lazy", *at_once}
