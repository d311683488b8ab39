"""The table of modules in architecture.md, from the first sentences of the package's own docstrings.

python -m tests.support.module_table > docs/modules.inc
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "dcp_async"


def first_sentence(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.:]) (?=[A-Z])", paragraph, maxsplit=1)[0]
    return re.sub(r"`+", "`", sentence.replace("|", "\\|"))


def folders(package: Path = PACKAGE) -> Iterator[Path]:
    """Each folder of modules, outermost first."""
    yield package
    for path in sorted(package.iterdir()):
        if (path / "__init__.py").exists():
            yield from folders(path)


def table(package: Path = PACKAGE) -> str:
    lines = []
    for folder in folders(package):
        if folder != package:
            lines += ["", f"**`{folder.relative_to(package)}/`** {first_sentence(folder / '__init__.py')}"]
        lines += ["", "| module | what it does |", "| --- | --- |"]
        lines += [
            f"| `{path.stem}` | {first_sentence(path)} |"
            for path in sorted(folder.glob("*.py"))
            if path.name != "__init__.py"
        ]
    return "\n".join(lines).lstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
