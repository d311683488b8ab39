"""How the documentation is built: `sphinx-build -W --keep-going -n docs build/docs`, without network.

Enters: the Markdown pages of this folder and the docstrings of the installed package. Leaves: HTML.
Docstrings are in the house's compact style (`Raises: A, B.` on one line); `expand_sections` makes fields of
them. Napoleon is not used: it knows no section on one line, and takes "Its name: the directory" for a type.
"""  # noqa: INP001 - Sphinx wants this file here, and no package around it

from __future__ import annotations

import re
from typing import Any

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

import dcp_async
from dcp_async import errors

project = "dcp_async"
version = release = dcp_async.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "text"
smartquotes = False  # messages are quoted as they are
default_role = "code"  # single backticks in docstrings

html_theme = "furo"
html_title = f"dcp_async {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = html_show_sphinx = False

autoclass_content = "both"  # arguments are described in __init__
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("CheckpointRef", "Event", "JSON")}
python_maximum_signature_line_length = 84
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    # Intersphinx would need the network, and the build must not.
    (r"py:.*", r"(collections|contextlib|os|pathlib|types|typing|torch)\..+"),
    # What autodoc leaves as the source spells it: built-in errors, names of typing, values of any kind.
    (
        r"py:(class|exc)",
        r"(Exception|\w+Error|Any|Callable|Mapping|Self|Sequence|JSON|Index|TypeAliasForwardRef|Literal\[.*)",
    ),
    # Of torch and the library, under the names that modules import them by.
    (
        r"py:class",
        (
            r"(concurrent\.futures\._base\.Future|Path|Metadata|Storage(Writer|Reader)|(Save|Load)Planner"
            r"|dist\.ProcessGroup|AsyncStager|AsyncCheckpointerType|ObjectStore|Credentials)"
        ),
    ),
    # Of ours, what a page says in words.
    (
        r"py:class",
        r"(Producer|Staged|dcp_async\.catalog\.retention\.CheckpointRecord|dcp_async\.formats\.(base|metadata_writer)\.\w+)",
    ),
    # Type variables have no page.
    (r"py:(class|obj)", r"(dcp_async\.response\.)?(T|T_co)"),
]

NOT_CALLED = {
    *("AsyncSaveResponse", "CheckpointHandle", "CheckpointInfo", "LoadReport", "StoredCheckpoint"),
    "Checkpoint",
    *("SaveStarted", "SaveStaged", "SaveProgress", "SaveCommitted", "SaveFailed"),
    *("Observer", "Storage", "StorageContract", "Transaction", "Reader"),
    *(name for name in dcp_async.__all__ if name in vars(errors)),
}
"""Classes that users do not call: the engine makes their objects, or they are protocols."""

SECTION = re.compile(
    r"(?P<name>Args|Returns|Yields|Raises|Cancellation|Ranks|Shapes|Units|Source): *(?P<text>.*)"
)
PARAMETER = re.compile(r"(?P<name>\w+): +(?P<text>.*)")
ERROR = re.compile(rf"(?<![\w`.~])({'|'.join(name for name in dcp_async.__all__ if name in vars(errors))})\b")


def expand_sections(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Rewrite the sections of a docstring, in place, into field lists; errors of ours become links.

    A section starts with a line `Name: text` or `Name:` and ends at the next one or at a blank line. Inside
    `Args` each `name: text` starts a parameter; any other line continues the one before it.
    """
    made: list[str] = []
    section = ""
    for line in lines:
        text = line.strip()
        if started := SECTION.fullmatch(text):
            if not section:
                made.append("")
            section, text = started["name"], started["text"]
            if section != "Args":
                made.append(f":{section}:")
        elif not text:
            section = ""
        if not section:
            made.append(line)
        elif section == "Args" and (parameter := PARAMETER.fullmatch(text)):
            made.append(f":param {parameter['name']}: {parameter['text']}")
        elif text:
            made[-1] += " " + (ERROR.sub(r":exc:`~dcp_async.\1`", text) if section == "Raises" else text)
    lines[:] = made


def tidy_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str | None] | None:
    """Show the arguments of a class only if users make its objects; name aliases as the source does."""
    if not signature:
        return None
    if name.rpartition(".")[2] in NOT_CALLED:
        return "", None
    return re.sub(r"[~\w.]*TypeAliasForwardRef\('(\w+)'\)", r"\1", signature), returns


def find_public(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Any) -> Any:
    """A type that is named by the module that defines it is documented under the name that users import."""
    module, _, name = str(node["reftarget"]).rpartition(".")
    if module and module.partition(".")[0] != "dcp_async":
        return None
    objects = env.domains.python_domain.objects
    for target in (f"dcp_async.{name}", f"dcp_async.storage.{name}"):
        if target in objects:
            found = objects[target]
            return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, content, target)
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", expand_sections)
    app.connect("autodoc-process-signature", tidy_signature)
    app.connect("missing-reference", find_public)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
