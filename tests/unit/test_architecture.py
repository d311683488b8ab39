"""Imports point one way, modules stay small, and torch's private names are imported where
docs/architecture.md says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dcp_async

PACKAGE = Path(dcp_async.__file__).parent

# Lower layers first; a module imports from its own layer or below.
LAYERS: list[set[str]] = [
    {
        "errors",
        "signal_safe",
        "_concurrency",
        "options",
        "trust",
        "plain",
        "pickle_walk",
        "pickle_grammar",
        "key_hashes",
        "legacy_item",
        "numpy_rebuilders",
        "rebuilding",
        "boundary",
    },
    {
        "formats",
        "formats.structure",
        "formats.zip_item",
        "formats.distcp",
        "formats.manifest",
        "formats.metadata",
        "formats.stock_pickle",
        "formats.stock_metadata",
        "formats.metadata_grammar",
        "item",
        "unfolding",
        "reference",
        "response",
        "_drive",
        "activity",
        "device",
        "observer",
        "boxes",
        "checkpointable",
        "garbage",
        "sharding",
        "wrapped",
        "depth",
        "tensor_memory",
        "gather",
        "mutation",
        "stepping",
        "stateful",
        "app_state",
        "optimizer_state",
        "optimizer_load",
        "flat_parameters",
        "naming",
        "walk",
        "order",
        "trail",
        "leaf_values",
        "leaves",
        "state",
        "materialise",
        "holdings",
        "targets",
        "storage",
        "storage.base",
        "storage.calls",
        "storage.files",
        "storage.lease",
        "storage.page_cache",
        "storage.safe_open",
        "storage.listing",
        "storage.local",
        "storage.deadline",
        "storage.local_transaction",
        "storage.local_reader",
    },
    {
        "offer",
        "global_plan",
        "proof",
        "replica_groups",
        "replica_turns",
        "canonical",
        "leaf_equality",
        "side_buffer",
        "replicas",
        "publication",
        "planner",
        "pool",
        "staging",
        "remote",
        "mailbox",
        "courier",
        "pulse",
        "gathering",
        "rendezvous",
        "settlement",
        "store_coordinator",
        "coordinator",
        "agreement",
        "joint_opening",
        "comparison",
        "plan_exchange",
        "catalog",
        "contents",
        "opening",
        "reading",
        "room",
        "wrapped_load",
        "spans",
        "hooks",
        "admission",
        "exit_guard",
    },
    {
        "pipeline",
        "release",
        "aliases",
        "entry_shapes",
        "matching",
        "fit",
        "load_pipeline",
        "restore",
        "outcome",
    },
    {"lifetime"},
    {"save_runner", "load_runner"},
    {"engine"},
    {"sync", ""},
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def _layer(name: str) -> int:
    for index, layer in enumerate(LAYERS):
        if name in layer:
            return index
    raise AssertionError(f"{name!r} has no layer: say where it belongs in test_architecture.py")


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
def test_imports_point_down(path: Path) -> None:
    for imported in _imports(path):
        assert _layer(imported) <= _layer(_name(path)), f"{_name(path)} imports {imported}"


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
    assert not makers or _name(path) in {"pipeline", "load_pipeline"}


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_environment_variables_are_no_api(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    # WORLD_SIZE is the launcher's, read to refuse what would overwrite other ranks' files
    assert not reads or _name(path) == "coordinator"
