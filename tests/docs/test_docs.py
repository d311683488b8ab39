"""The documentation is true: its programs run and print what it says they print, its links lead somewhere.

The rules of a page:
- Fenced `python` blocks run in their order, in one namespace, in an empty directory. `await` needs no
  function around it; a block that defines a coroutine function `main` is run by awaiting `main()`.
- The namespace begins with the first block of docs/howto/index.md: model, optim, loader, state, train_step.
- A `text` block right behind a `python` block is what that block prints; `...` stands for anything.
- A block that can't run says so in its info string: `python no-run: reason`.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import io
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType

import pytest

import dcp_async
from dcp_async import errors
from docs import drawings
from tests.support import module_table

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]
PRELUDE_PAGE = DOCS / "howto" / "index.md"
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL
)
COMPARE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
EXCUSED_AT_MOST = 3
WIDEST_LINE = 100
"""Columns that docs/_static/site.css gives to a line of code before it scrolls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced `python` block of a page."""

    page: Path
    line: int
    """Of its first line of code."""
    code: str
    excuse: str | None
    """Why it is not run."""
    output: str | None
    """What it prints, if the page says."""

    def compiled(self) -> CodeType:
        """Its code, with the page's own line numbers in tracebacks."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile("\n" * (self.line - 1) + self.code, str(self.page), "exec", flags, dont_inherit=True)
        assert isinstance(code, CodeType)
        return code


def blocks_of(page: Path) -> list[Block]:
    """The `python` blocks of ``page``, each with the `text` block that follows it."""
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    found = []
    for index, fence in enumerate(fences):
        language, _, rest = fence["info"].partition(" ")
        if language != "python":
            continue
        output = None
        if index + 1 < len(fences) and fences[index + 1]["info"] == "text":
            following = fences[index + 1]
            if not text[fence.end() : following.start()].strip():
                output = following["body"]
        line = text.count("\n", 0, fence.start("body")) + 1
        excuse = rest.removeprefix("no-run:").strip() if rest else None
        found.append(Block(page=page, line=line, code=fence["body"], excuse=excuse, output=output))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def anchors_of(page: Path) -> set[str]:
    """What GitHub and MyST make of the headings of ``page``."""
    prose = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#{1,6} +(.+?) *$", prose, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    explicit = re.findall(r"^\(([\w-]+)\)=$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain} | set(explicit)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what a page sets for the process is taken back."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


async def run_block(block: Block, namespace: dict[str, object]) -> str:
    """Run ``block``; gives what it printed."""
    earlier = namespace.get("main")
    printed = io.StringIO()
    with redirect_stdout(printed):
        running = eval(block.compiled(), namespace)  # the block itself, or its coroutine if it awaits
        if inspect.isawaitable(running):
            await running
        main = namespace.get("main")
        if main is not earlier and inspect.iscoroutinefunction(main):
            await main()
    return printed.getvalue()


# Parts of torch that these programs use, torch.compile and its DataLoader, use what torch itself deprecates.
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=name_of)
async def test_programs_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ModuleType("__main__")  # classes that a page defines are pickled by this name, as in a script
    monkeypatch.setitem(sys.modules, "__main__", script)
    prelude, *_ = blocks_of(PRELUDE_PAGE)
    try:
        if page != PRELUDE_PAGE:
            await run_block(prelude, vars(script))
        for block in blocks_of(page):
            if block.excuse is None:
                printed = await run_block(block, vars(script))
                if block.output is not None:
                    assert doctest.OutputChecker().check_output(block.output, printed, COMPARE), (
                        f"{name_of(page)}, line {block.line} prints\n{printed}instead of\n{block.output}"
                    )
    finally:
        for value in list(vars(script).values()):
            if isinstance(value, dcp_async.CheckpointEngine):  # left open by a block that failed
                await value.abort()


def test_few_programs_are_excused_and_each_says_why() -> None:
    excused = [block for page in PAGES for block in blocks_of(page) if block.excuse is not None]
    assert all(block.excuse for block in excused)
    assert len(excused) <= EXCUSED_AT_MOST, [f"{name_of(block.page)}:{block.line}" for block in excused]


def test_info_strings_are_spelled_as_this_file_reads_them() -> None:
    infos = {fence["info"] for page in PAGES for fence in FENCE.finditer(page.read_text())}
    python = {info for info in infos if re.match(r"(?i)\{?py|\{code", info)}
    assert {info for info in python if not re.fullmatch(r"python( no-run: \S.*)?", info)} == set()


def test_api_page_documents_every_public_name() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    directives = re.findall(
        r"^\.\. (?:autoclass|autoexception|autofunction|py:type):: dcp_async\.(\w+)\b(?!\.)",
        text,
        re.MULTILINE,
    )
    assert sorted(directives) == sorted(dcp_async.__all__)


def test_api_page_documents_the_blocking_engine() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    assert ".. autoclass:: dcp_async.sync.CheckpointEngine" in text


ERRORS = [
    name
    for name, cls in vars(errors).items()
    if isinstance(cls, type) and issubclass(cls, Exception) and cls.__module__ == errors.__name__
]


@pytest.mark.parametrize("name", ERRORS)
def test_errors_page_has_a_section_for(name: str) -> None:
    assert name.lower() in anchors_of(DOCS / "reference" / "errors.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors_of(there)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_a_table_of_contents() -> None:
    listed: set[Path] = {DOCS / "index.md"}
    for page in DOCS.rglob("*.md"):
        for fence in FENCE.finditer(page.read_text()):
            if fence["info"] == "{toctree}":
                for entry in fence["body"].split("\n"):
                    if entry and not entry.startswith(":"):
                        listed |= set(page.parent.glob(f"{entry.removesuffix('.md')}.md"))
    assert {name_of(page) for page in DOCS.rglob("*.md")} - {name_of(page) for page in listed} == set()


def test_the_table_of_modules_is_what_the_modules_say() -> None:
    """``python -m tests.support.module_table > docs/modules.inc`` makes it anew."""
    assert (DOCS / "modules.inc").read_text() == module_table.table()


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_what_its_source_draws(name: str) -> None:
    """``python docs/drawings.py`` makes all of them anew."""
    assert (drawings.STATIC / name).read_text() == drawings.DRAWINGS[name]().svg()


def test_the_folders_of_the_drawing_are_those_of_the_package() -> None:
    drawn = set(re.findall(r'class="folder">(\w+)/<', drawings.path_of_a_tensor().svg()))
    # no tensor goes through tests, commands or the choice of a step, and the twins have no way of their own
    folders = {path.parent.name for path in module_table.PACKAGE.glob("*/__init__.py")}
    assert drawn == folders - {"cli", "testing", "schedule", "sync"}


WHERE_TO_READ = sorted(
    set(re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", (DOCS / "architecture.md").read_text()))
)


@pytest.mark.parametrize(("name", "file"), WHERE_TO_READ, ids=lambda value: value.replace("/", "."))
def test_what_the_page_on_architecture_names_is_there(name: str, file: str) -> None:
    tree = ast.parse((module_table.PACKAGE / file).read_text())
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, defined)}


def test_files_of_the_package_that_pages_name_are_there() -> None:
    """ADRs are left out: they tell what was."""
    folders = "|".join(path.parent.name for path in module_table.PACKAGE.glob("*/__init__.py"))
    named = {
        file
        for page in PAGES
        if page.parent.name != "adr"
        for file in re.findall(rf"`(?:dcp_async/)?((?:{folders})/[\w/]+\.py)`", page.read_text())
    }
    assert {file for file in named if not (module_table.PACKAGE / file).exists()} == set()


def test_fenced_lines_fit_the_page() -> None:
    long = [
        f"{name_of(page)}: {line}"
        for page in DOCS.rglob("*.md")
        for fence in FENCE.finditer(page.read_text())
        for line in fence["body"].splitlines()
        if len(line) > WIDEST_LINE
    ]
    assert long == []
