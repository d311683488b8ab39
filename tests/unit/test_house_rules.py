"""Which private names of torch the modules lean on, and how a reach into another module is recognised.

What is counted, and how, is in `tests/support/house_figures.py`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import house_figures
from tests.support.house_figures import Module, Reaches


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    """Those of the package, parsed where they are asked for: not by each worker that collects the tests."""
    return house_figures.modules_of()


def test_private_names_of_torch_are_those_that_the_documentation_lists(modules: list[Module]) -> None:
    """The list is docs/private-names.inc, a part of docs/architecture.md."""
    assert house_figures.foreign_privates(modules) == house_figures.listed_privates()


def test_no_module_reaches_into_another_ones_objects(modules: list[Module]) -> None:
    reaches = [
        f"{place.path.relative_to(house_figures.REPOSITORY)}:{place.line} {place.what}"
        for place in house_figures.private_reaches(modules)
    ]
    assert reaches == []


_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)


def test_no_lock_of_a_trainers_thread_is_held_around_a_loop_of_the_same_function(
    modules: list[Module],
) -> None:
    """CPython 3.13 has no handler for an interrupt between two rounds of most loops: it passes by the `with`,
    and the lock stays locked. In a call such a loop does no harm."""
    around = [
        f"{module.path.name}:{block.lineno}"
        for module in modules
        if module.path.parent.name == "engine"
        for block in ast.walk(module.tree)
        if isinstance(block, ast.With)
        and any(re.search(r"\._(lock|numbering)$", ast.unparse(item.context_expr)) for item in block.items)
        and any(isinstance(inner, _LOOPS) for inner in ast.walk(block))
    ]
    assert around == []


_MAKERS = {f"torch.{name}" for name in ("arange", "as_tensor", "empty", "empty_strided", "full", "ones")}
_MAKERS |= {f"torch.{name}" for name in ("rand", "randn", "scalar_tensor", "tensor", "zeros")}


def test_every_tensor_is_made_on_a_device_that_is_named(modules: list[Module]) -> None:
    """Else it lies where the user's default device is, whose memory may have no address here."""
    calls = [
        f"{module.path.name}:{call.lineno}"
        for module in modules
        for call in ast.walk(module.tree)
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in _MAKERS
        and not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert calls == []


REACHES = {
    "an annotated parameter": "from .b import B\ndef f(b: B) -> None: b._x",
    "an annotation in quotes": "from .b import B\ndef f(b: 'B | None') -> None: b._x",
    "what a constructor made": "from .b import B\ndef f() -> None:\n    made = B()\n    made._x",
    "a parameter that an object keeps": (
        "from .b import B\nclass A:\n    _x = 1\n    def __init__(self, b: B) -> None: self.b = b\n"
        "    def f(self) -> None: self.b._x"
    ),
    "a field": "from .b import B\nclass A:\n    _x: int\n    b: B\n    def f(self) -> None: self.b._x",
    "an unknown object": "def f(b): b.c._x",
    "an import": "from .b import _x",
    "getattr": "def f(b): getattr(b, '_x')",
    "a class of ours that derives from one of torch's": "from torch import T\ndef f(b: T) -> None: b._x",
}
OWN = {
    "self": "class A:\n    def f(self) -> None: self._x",
    "another object of one's own class": "class A:\n    _x = 1\n    def f(self, o: A) -> bool: return o._x",
    "a name of one's own on an unknown object": "class A:\n    _x = 1\ndef f(a): a._x",
    "torch's": "import torch\ndef f(t: torch.Tensor) -> None: t._x",
    "a private name that nobody has": "def f(t): t._y",
}


def _reaches(source: str, tmp_path: Path) -> Reaches:
    other = "from torch import T\nclass B(T):\n    def __init__(self) -> None: self._x = 1\n"
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.py").write_text(other)
    first, second = house_figures.modules_of(tmp_path)
    return Reaches(first, [second], set())


@pytest.mark.parametrize("source", REACHES.values(), ids=REACHES)
def test_a_reach_into_another_modules_object_is_seen(source: str, tmp_path: Path) -> None:
    assert len(_reaches(source, tmp_path).reaches) == 1


@pytest.mark.parametrize("source", OWN.values(), ids=OWN)
def test_what_is_ones_own_or_torchs_is_no_reach(source: str, tmp_path: Path) -> None:
    assert _reaches(source, tmp_path).reaches == []
