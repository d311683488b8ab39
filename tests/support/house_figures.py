"""The figures by which the house is kept, counted over the syntax trees of the package.

    python tests/support/house_figures.py            the table, then each place that is over; status 1 if any
    python tests/support/house_figures.py --report   the same, and status 0

Needs nothing but Python: the session `lint` runs it. The rules that are counted here as zero are tests of
their own in `tests/unit/test_house_rules.py`, which names the module that breaks one.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "dcp_async"
PRIVATE_NAMES = REPOSITORY / "docs" / "private-names.inc"
"""The one list of torch's and numpy's private names that we use, by module: part of docs/architecture.md."""

MODULE_LINES = 420
FUNCTION_LINES = 50
NAMES_OF_NOTHING = {"found", "each", "at", "there", "those", "of"}
"""As a local name none of these says what the thing is."""

FunctionNode = (ast.FunctionDef, ast.AsyncFunctionDef)
PRIVATE = re.compile(r"_[A-Za-z]\w*")
ATTRIBUTE_CALLS = {"delattr", "getattr", "hasattr", "setattr"}
UNKNOWN = {"Any", "object"}
BUILTINS = {"bytes", "dict", "int", "list", "set", "str", "tuple"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a figure counts one."""

    path: Path
    line: int
    what: str


class Module:
    """One source file of the package."""

    def __init__(self, path: Path, package: Path) -> None:
        self.path = path
        self.source = path.read_text()
        self.tree = ast.parse(self.source)
        parts = list(path.relative_to(package).with_suffix("").parts)
        self.is_face = parts[-1] == "__init__"
        self.parts = parts[:-1] if self.is_face else parts
        """Below the package: ``["save", "pipeline"]``."""

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    @property
    def folder(self) -> list[str]:
        """The package that relative imports start from."""
        return self.parts if self.is_face else self.parts[:-1]

    def place(self, node: ast.AST, what: str) -> Place:
        return Place(path=self.path, line=getattr(node, "lineno", 1), what=what)

    def origin(self, node: ast.ImportFrom) -> str | None:
        """The module of this package that ``node`` imports from, or None if it is another package's."""
        if not node.level:
            return None
        base = self.folder[: len(self.folder) - node.level + 1]
        return ".".join([*base, *(node.module or "").split(".")]).rstrip(".")

    @cached_property
    def origins(self) -> dict[str, str]:
        """Imported name -> where from: ``folder.module:name``, or ``/torch.nn`` of another package."""
        origins: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                origin = self.origin(node)
                for alias in node.names:
                    bound = alias.asname or alias.name
                    foreign = f"/{node.module}.{alias.name}"
                    origins[bound] = foreign if origin is None else f"{origin}:{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    origins[alias.asname or alias.name.split(".")[0]] = f"/{alias.name}"
        return origins

    @cached_property
    def own_classes(self) -> set[str]:
        return {node.name for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)}

    @cached_property
    def bases(self) -> set[str]:
        """What its classes derive from, as spelled here."""
        classes = [node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]
        return {ast.unparse(base) for node in classes for base in node.bases}

    @cached_property
    def own_privates(self) -> set[str]:
        """Private names that this module gives to something: attributes, methods, functions, constants."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, (*FunctionNode, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("self", "cls")
            ):
                names.add(node.attr)
        return {name for name in names if PRIVATE.fullmatch(name)}


def modules_of(package: Path = PACKAGE) -> list[Module]:
    return [Module(path, package) for path in sorted(package.rglob("*.py"))]


class Reaches(ast.NodeVisitor):
    """Every ``x._y`` of a module where ``x`` is of another module of the package.

    What ``x`` is comes from annotations of parameters, variables and attributes, and from ``x = Class(...)``;
    an imported name is what it was imported as. Where that says nothing, or says a class of another package
    that one of ours derives from, a name that this module defines itself counts as its own, one that only
    other modules of the package define as a reach unless ``PRIVATE_NAMES`` has it, and one that none of them
    defines as foreign (torch's). Importing a private name from another module is a reach too. ``self``,
    ``cls`` and ``super()`` are one's own.
    """

    def __init__(self, module: Module, others: Sequence[Module], listed: set[str]) -> None:
        self._module = module
        self._privates_of_others = set().union(*(other.own_privates for other in others)) - listed
        self._bases = module.bases.union(*(other.bases for other in others))
        self._types: list[dict[str, str]] = [{}]
        """By scope, innermost last: variable (or ``self.attribute``) -> name of its class."""
        self.reaches: list[Place] = []
        self.foreign: set[str] = set()
        """Private names of other packages but Python's own: of torch and numpy."""
        for statement in module.tree.body:
            self._assignment(statement, self._types[0], {}, prefix="")
        self.visit(module.tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        known: dict[str, str] = {}
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                self._note(known, f"self.{statement.target.id}", statement.annotation)
            elif isinstance(statement, FunctionNode):
                parameters = self._parameters(statement)
                if statement.returns and any(
                    isinstance(decorator, ast.Name) and decorator.id in ("property", "cached_property")
                    for decorator in statement.decorator_list
                ):
                    self._note(known, f"self.{statement.name}", statement.returns)
                for inner in ast.walk(statement):
                    self._assignment(inner, known, parameters, prefix="self.")
        self._types.append(known)
        self.generic_visit(node)
        self._types.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        known = self._parameters(node)
        for inner in ast.walk(node):
            self._assignment(inner, known, known, prefix="")
        self._types.append(known)
        self.generic_visit(node)
        self._types.pop()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = self._module.origin(node)
        for alias in node.names:
            if origin is None:
                self._note_foreign(f"{node.module}.{alias.name}")
            elif node.module is not None and PRIVATE.fullmatch(alias.name):
                self.reaches.append(self._module.place(node, f"imports {origin}.{alias.name}"))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._note_foreign(alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = ast.unparse(node.func)
        if function == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
            self._note_foreign(str(node.args[0].value))
        elif function in ATTRIBUTE_CALLS and isinstance(node.args[1], ast.Constant):
            name = str(node.args[1].value)
            if PRIVATE.fullmatch(name) and name not in self._module.own_privates:
                if name in self._privates_of_others:
                    self.reaches.append(self._module.place(node, ast.unparse(node)))
                else:
                    self.foreign.add(name)

    def _note_foreign(self, path: str) -> None:
        """Note what is private of ``path``, an import of another package."""
        root, *names = path.split(".")
        if root not in sys.stdlib_module_names:
            self.foreign |= {name for name in names if PRIVATE.fullmatch(name)}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if not PRIVATE.fullmatch(node.attr) or self._is_own(node.value):
            return
        home = self._home(node.value)
        if home is None:
            if node.attr in self._module.own_privates:
                return
            home = "" if node.attr in self._privates_of_others else "/"
        if home.startswith("/"):
            if home[1:].partition(".")[0] not in sys.stdlib_module_names:
                self.foreign.add(node.attr)
        elif home != self._module.name:
            self.reaches.append(self._module.place(node, ast.unparse(node)))

    @staticmethod
    def _is_own(base: ast.expr) -> bool:
        if isinstance(base, ast.Call):
            return isinstance(base.func, ast.Name) and base.func.id == "super"
        return isinstance(base, ast.Name) and base.id in ("self", "cls")

    def _home(self, base: ast.expr) -> str | None:
        """The module of the class of ``base``, ``/package`` if another package's, None if unknown."""
        root = base
        while isinstance(root, ast.Attribute):
            root = root.value
        name = ast.unparse(root)
        if isinstance(root, ast.Name) and (self._class_of(name) or name).startswith("/"):
            return self._class_of(name)  # what lies in a module of another package is that package's
        if isinstance(root, ast.Name) and self._module.origins.get(name, "").startswith("/"):
            return self._module.origins[name]
        text = ast.unparse(base.value if isinstance(base, ast.Await) else base)
        if isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id[:1].isupper():
            known: str | None = base.func.id
        else:
            known = self._class_of(text) or (text if isinstance(base, ast.Name) else None)
        if known is None or known in UNKNOWN:
            return None
        first = known.partition(".")[0]
        if first in self._module.own_classes:
            return self._module.name
        if first in BUILTINS:
            return "/builtins"
        origin = self._module.origins.get(first)
        if origin is None or (origin.startswith("/") and known in self._bases):
            return None
        return origin.partition(":")[0]

    def _class_of(self, text: str) -> str | None:
        return next((scope[text] for scope in reversed(self._types) if text in scope), None)

    def _parameters(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
        known: dict[str, str] = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None:
                self._note(known, argument.arg, argument.annotation)
        return known

    def _assignment(
        self, node: ast.AST, known: dict[str, str], locals_: dict[str, str], *, prefix: str
    ) -> None:
        """Learn from ``x: Class``, ``x = Class(...)`` and ``self.x = parameter``."""
        if isinstance(node, ast.AnnAssign):
            target: ast.expr = node.target
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
        else:
            return
        text = ast.unparse(target)
        if not isinstance(target, (ast.Name, ast.Attribute)) or not text.startswith(prefix):
            return
        value = node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "importlib.import_module":
            known[text] = "/" + ast.unparse(value.args[0]).strip("'\"")
        elif isinstance(value, ast.Attribute) and (path := self._foreign_path(value)):
            known[text] = path
        elif isinstance(node, ast.AnnAssign):
            self._note(known, text, node.annotation)
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            if value.func.id[:1].isupper():
                known[text] = value.func.id
        elif isinstance(value, ast.Name) and value.id in locals_:
            known[text] = locals_[value.id]

    def _foreign_path(self, chain: ast.Attribute) -> str | None:
        """``/torch._utils`` for that attribute of an imported package, else None."""
        root, _, rest = ast.unparse(chain).partition(".")
        origin = self._module.origins.get(root, "")
        return f"{origin}.{rest}" if origin.startswith("/") else None

    @staticmethod
    def _note(known: dict[str, str], name: str, annotation: ast.expr) -> None:
        text = re.sub(r"\s*\|\s*None$", "", ast.unparse(annotation).strip("'\""))
        if match := re.fullmatch(r"([\w.]+)(\[.*\])?", text):
            known[name] = match[1]


def listed_privates() -> dict[str, set[str]]:
    """By module, what ``PRIVATE_NAMES`` lists."""
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \|", PRIVATE_NAMES.read_text(), re.MULTILINE)
    return {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}


def reaches_of(modules: Sequence[Module]) -> Iterator[tuple[Module, Reaches]]:
    listed = listed_privates()
    for module in modules:
        others = [other for other in modules if other is not module]
        yield module, Reaches(module, others, listed.get(module.name, set()))


def private_reaches(modules: Sequence[Module]) -> Iterator[Place]:
    for _, reaches in reaches_of(modules):
        yield from reaches.reaches


def foreign_privates(modules: Sequence[Module]) -> dict[str, set[str]]:
    """By module, the private names of torch and numpy that it uses."""
    return {module.name: reaches.foreign for module, reaches in reaches_of(modules) if reaches.foreign}


def rooms(package: Path) -> list[Place]:
    """What a reader of ``ls`` sees."""
    passed_over = {"__init__.py", "py.typed", "__pycache__"}
    return [
        Place(path=path, line=1, what="a room")
        for path in sorted(package.iterdir())
        if path.name not in passed_over and not path.name.startswith(".")
    ]


def faces_without_contract(modules: Sequence[Module]) -> Iterator[Place]:
    for module in modules:
        if not module.is_face or not module.parts:
            continue
        lists_names = any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for node in module.tree.body
        )
        contract = (ast.get_docstring(module.tree) or "").split("\n\n")[0]
        if not lists_names or not contract.endswith("."):
            missing = "a contract sentence" if lists_names else "__all__"
            yield module.place(module.tree, f"{module.name} without {missing}")


def long_modules(modules: Sequence[Module]) -> Iterator[Place]:
    for module in modules:
        if (lines := len(module.source.splitlines())) > MODULE_LINES:
            yield module.place(module.tree, f"{lines} lines")


def long_functions(modules: Sequence[Module]) -> Iterator[Place]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, FunctionNode):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield module.place(node, f"{node.name}: {lines} lines")


def locals_that_name_nothing(modules: Sequence[Module]) -> Iterator[Place]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.ExceptHandler):
                name = node.name or ""
            else:
                continue
            if name in NAMES_OF_NOTHING:
                yield module.place(node, name)


def docstrings_that_lean(modules: Sequence[Module]) -> Iterator[Place]:
    """Docstrings, those of fields too, whose first sentence does not stand alone."""
    for module in modules:
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
                and re.match(r"\s*(Of|The same)\b", node.value.value)
            ):
                yield module.place(node, node.value.value.strip().splitlines()[0])


def comment_percentage(modules: Sequence[Module]) -> float:
    """Lines that hold a comment, of all lines."""
    comments = lines = 0
    for module in modules:
        lines += len(module.source.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(module.source).readline)
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
    return 100 * comments / lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    what: str
    before: str
    """In the last revision with one flat folder, counted by this script."""
    asked: str
    now: str
    is_met: bool
    places: Sequence[Place] = ()


def rows(package: Path = PACKAGE) -> list[Row]:
    modules = modules_of(package)

    def counted(what: str, before: str, most: int, places: Sequence[Place]) -> Row:
        asked = f"<= {most}" if most else "0"
        return Row(
            what=what,
            before=before,
            asked=asked,
            now=str(len(places)),
            is_met=len(places) <= most,
            places=places,
        )

    zero: list[tuple[str, str, Callable[[Sequence[Module]], Iterator[Place]]]] = [
        ("folders without a contract sentence and __all__", "all", faces_without_contract),
        ("private reaches across modules", "37", private_reaches),
        (f"modules over {MODULE_LINES} lines", "13", long_modules),
        (f"functions over {FUNCTION_LINES} lines", "9", long_functions),
        ("locals that name nothing (found, each, ...)", "319", locals_that_name_nothing),
        ('docstrings that begin with "Of" or "The same"', "82", docstrings_that_lean),
    ]
    percentage = comment_percentage(modules)
    return [
        # 22 when the folders were made; interop and testing came since, and functional, integrations,
        # observers and a command line are to come (docs/adr/0021)
        counted("rooms that a reader of `ls dcp_async` sees", "98", 28, rooms(package)),
        *(counted(what, before, 0, list(count(modules))) for what, before, count in zero),
        Row(
            what="comment lines, % of all",
            before="1.8",
            asked="4-8",
            now=f"{percentage:.1f}",
            is_met=4 <= percentage <= 8,
        ),
    ]


def table(figures: Sequence[Row]) -> str:
    lines = [f"{'':48}{'before':>8}{'asked':>8}{'now':>8}"]
    for row in figures:
        mark = "" if row.is_met else "  <--"
        lines.append(f"{row.what:48}{row.before:>8}{row.asked:>8}{row.now:>8}{mark}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="say what is over, and end with status 0")
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE, help="the folder to count")
    given = parser.parse_args()
    figures = rows(given.package)
    sys.stdout.write(table(figures) + "\n")
    for row in figures:
        if not row.is_met and row.places:
            sys.stdout.write(f"\n{row.what}:\n")
            for place in row.places:
                relative = place.path.relative_to(given.package.parent)
                sys.stdout.write(f"    {relative}:{place.line}  {place.what}\n")
    return 0 if given.report or all(row.is_met for row in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
