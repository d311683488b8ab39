"""Writes the imports of the faces that import on demand: for type checkers, and for run time.

    python -m tests.support.lazy_faces

Write `from .module import Name` anywhere among the imports of such a face, run this, then `lint --fix`. A
test says which face is not as this would have it.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dcp_async"
_WIDTH = 88


def faces() -> list[Path]:
    """The faces that import on demand."""
    return [path for path in sorted(PACKAGE.rglob("__init__.py")) if "lazily(" in path.read_text()]


def imports_of(face: Path) -> dict[str, set[str]]:
    """Module -> names, of all relative imports of the face, wherever they stand; but for its helper."""
    modules: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(face.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level and node.module not in (None, "_lazy"):
            modules.setdefault(node.module or "", set()).update(alias.name for alias in node.names)
    return modules


def at_once(face: Path) -> dict[str, set[str]]:
    """Those that can't wait: a name that is a module's too, whose place the module would take."""
    modules = {path.stem for path in face.parent.glob("*.py")}
    return {module: names for module, names in imports_of(face).items() if names & modules}


def mapping_of(face: Path) -> dict[str, str]:
    """What the face tells `lazily`."""
    (mapping,) = (
        ast.literal_eval(node.args[1])
        for node in ast.walk(ast.parse(face.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazily"
    )
    return dict(mapping)


def rewritten(face: Path) -> str:
    """The face with its imports written anew."""
    source = face.read_text()
    first = next(at for at, line in enumerate(source.splitlines()) if line.startswith("from typing"))
    rest = source[source.index("\n__version__" if "\n__version__" in source else "\n__all__") :]
    eager = at_once(face)
    lazy = {module: names for module, names in imports_of(face).items() if module not in eager}
    folders = [module for module, names in mapping_of(face).items() if not names and module not in lazy]
    up = "." * (len(face.parent.relative_to(PACKAGE.parent).parts))
    lines = [
        *source.splitlines()[:first],
        "from typing import TYPE_CHECKING",
        "",
        f"from {up}_lazy import lazily",
        *_statements(eager, ""),
        "",
        "if TYPE_CHECKING:",
        *_statements(lazy, "    "),
        "else:",
        "    __getattr__, __dir__ = lazily(",
        "        __name__,",
        "        {",
        *_entries(lazy),
        *(f'            "{folder}": "",' for folder in folders),
        "        },",
        "    )",
    ]
    return "\n".join(lines) + "\n" + rest


def _ordered(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def _statements(modules: Mapping[str, set[str]], indent: str) -> Iterator[str]:
    for module in sorted(modules):
        line = f"{indent}from .{module} import {', '.join(_ordered(modules[module]))}"
        if len(line) <= 110:
            yield line
        else:
            yield f"{indent}from .{module} import ("
            yield from (f"{indent}    {name}," for name in _ordered(modules[module]))
            yield f"{indent})"


def _entries(modules: Mapping[str, set[str]]) -> Iterator[str]:
    for module in sorted(modules):
        names = " ".join(_ordered(modules[module]))
        line = f'            "{module}": "{names}",'
        if len(line) <= 110:
            yield line
            continue
        parts = textwrap.wrap(names, _WIDTH)
        yield f'            "{module}": ('
        yield from (f'                "{part} "' for part in parts[:-1])
        yield f'                "{parts[-1]}"'
        yield "            ),"


if __name__ == "__main__":
    for path in faces():
        path.write_text(rewritten(path))
