"""The page that has a row for every name of DCP is whole, and what it says to write is there.

docs/reference/dcp-names.md is read as it is. A name of the left column may say with which release of torch it
came: `name` (2.14). A span of code in the right column is Python: names are resolved, keywords looked up.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import dcp_async
import dcp_async.functional
import dcp_async.interop
import dcp_async.storage
import dcp_async.sync
import dcp_async.testing
from dcp_async.engine.release import NEWEST

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "dcp-names.md"
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

DOCUMENTED_IN = ("_extension", "_fsspec_filesystem")
"""Private modules whose names torch's documentation, or its users, know."""

ROOTS: dict[str, Any] = {
    **vars(builtins),
    **{name: getattr(dcp_async, name) for name in dcp_async.__all__},
    **{name: getattr(dcp_async, name) for name in ("functional", "interop", "storage", "sync", "testing")},
    **{name: getattr(dcp, name) for name in ("DefaultSavePlanner", "DefaultLoadPlanner")},
    "StateDictOptions": dcp.state_dict.StateDictOptions,
    "dcp": dcp,
    "dcp_async": dcp_async,
    "safetensors": safetensors,
    "torch": torch,
    # objects, for which their classes stand
    "checkpoint": dcp_async.Checkpoint,
    "engine": dcp_async.CheckpointEngine,
    "info": dcp_async.CheckpointInfo,
    "model": torch.nn.Module,
    "response": dcp_async.AsyncSaveResponse,
}
"""What code of the right column may begin with."""
VALUES = {"state", "n", "path", "optim", "yours"}
"""Variables of the reader's."""
ATTRIBUTES = frozenset(
    re.findall(r"^[\w.]+", (Path(__file__).parent / "public_api.txt").read_text(), re.MULTILINE)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the page."""

    names: tuple[tuple[str, tuple[int, int]], ...]
    """Names of DCP and the releases of torch that have them first."""
    text: str
    """The right column."""

    @property
    def code(self) -> list[str]:
        return re.findall(r"`([^`]+)`", self.text)


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        if (cells := re.fullmatch(r"\| (`dcp\..*?) \| (.*) \|", line)) is None:
            continue
        spans = re.findall(r"`(dcp\.[\w.]+)`(?: \((\d+)\.(\d+)\))?", cells[1])
        names = tuple((name, (int(major or 0), int(minor or 0))) for name, major, minor in spans)
        found.append(Row(names=names, text=cells[2]))
    return found


ROWS = rows()
ROW_IDS = [row.names[0][0] for row in ROWS]


def public_names() -> Iterator[tuple[str, object]]:
    """What torch's own lists have: those of the package, of its public modules and of DOCUMENTED_IN."""
    for name, value in vars(dcp).items():
        if not name.startswith("_") and not isinstance(value, types.ModuleType):
            yield f"dcp.{name}", value
    for _, name, _ in pkgutil.iter_modules(dcp.__path__):
        if name in DOCUMENTED_IN or not name.startswith("_"):
            module = importlib.import_module(f"{dcp.__name__}.{name}")
            for public in module.__all__:
                yield f"dcp.{name}.{public}", getattr(module, public)


def torchs(name: str) -> object:
    """The object that a name of the left column means."""
    path, _, last = name.removeprefix("dcp.").rpartition(".")
    module = importlib.import_module(f"{dcp.__name__}.{path}") if path else dcp
    return getattr(module, last)


def is_torchs(name: str) -> bool:
    try:
        torchs(name)
    except (AttributeError, ImportError):
        return False
    return True


# torch 2.15 warns of the private module that it made public
@pytest.mark.filterwarnings("ignore:.*_fsspec_filesystem:DeprecationWarning")
@pytest.mark.skipif(
    TORCH > NEWEST, reason="the page is about the releases of torch that this one was tested with"
)
def test_every_public_name_of_torch_has_a_row() -> None:
    named = {name for row in ROWS for name, since in row.names if since <= TORCH}
    objects = {id(torchs(name)) for name in named}
    missing = [name for name, value in public_names() if name not in named and id(value) not in objects]
    assert missing == []


@pytest.mark.filterwarnings("ignore:.*_fsspec_filesystem:DeprecationWarning")
def test_every_row_names_what_torch_has_and_no_other_row_names() -> None:
    names = [(name, since) for row in ROWS for name, since in row.names]
    assert len({name for name, _ in names}) == len(names)
    assert [name for name, _ in names if not is_torchs(name)] == [
        name for name, since in names if since > TORCH
    ]


@pytest.mark.parametrize("row", ROWS, ids=ROW_IDS)
def test_what_a_row_says_to_write_is_there(row: Row) -> None:
    roots = {resolve_code(code) for code in row.code}
    if re.match(r"\*\*(as (it is|they are)|none)\*\*", row.text) is None:
        assert "dcp_async" in set().union(*roots), f"{row.text} names nothing of this package"


def resolve_code(code: str) -> frozenset[str]:
    """The packages that a span of code takes its names from. Raises AssertionError: a name is not there."""
    tree = ast.parse(code)
    nodes = list(ast.walk(tree))
    variables = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    packages = set()
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in variables | VALUES:
            meant = resolve(node)
            module = meant if isinstance(meant, types.ModuleType) else inspect.getmodule(meant)
            packages.add(module.__name__.partition(".")[0] if module else "")
        elif isinstance(node, ast.Attribute):
            resolve(node)
        elif isinstance(node, ast.Call):
            keywords = [keyword.arg for keyword in node.keywords]
            parameters = inspect.signature(resolve(node.func)).parameters if keywords else {}
            assert set(keywords) <= set(parameters), f"{code}: {ast.unparse(node.func)} takes {[*parameters]}"
    return frozenset(packages)


def resolve(node: ast.expr) -> Any:
    """What a dotted name means."""
    if isinstance(node, ast.Name):
        assert node.id in ROOTS, f"{node.id} is neither a name of dcp_async nor one that this test knows"
        return ROOTS[node.id]
    assert isinstance(node, ast.Attribute), ast.unparse(node)
    owner = resolve(node.value)
    if not hasattr(owner, node.attr) and f"dcp_async.{owner.__name__}.{node.attr}" in ATTRIBUTES:
        return None  # of objects, not of their class
    return getattr(owner, node.attr)


@pytest.mark.parametrize(
    "code",
    [
        "engine.saves",
        "CheckpointEngines",
        "StagingOptions(overlaps=True)",
        "await engine.load(state, key=['a'])",
    ],
)
def test_code_that_is_not_there_is_found_out(code: str) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        resolve_code(code)
