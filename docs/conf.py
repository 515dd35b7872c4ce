"""The pages of this folder and an API reference made from the docstrings.

    sphinx-build -W --keep-going docs docs/_build

Needs no network. Every reference in a docstring must lead somewhere: a broken one is an error.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from speechbrain_qmargin import __version__  # noqa: E402

project = "speechbrain_qmargin"
author = copyright = "the speechbrain_qmargin developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"speechbrain_qmargin {version}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": str(ROOT / "speechbrain_qmargin"),
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members"},
    }
]
# a re-export is documented where it is defined
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Settings", "params_style")]  # what a class reads from hparams

nitpicky = True
# what other projects document; their inventories would have to be fetched
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torchaudio|numpy|scipy|sklearn|speechbrain|hyperpyyaml|PIL|onnx\w*)\..*"),
    (r"py:.*", r"(argparse|logging|multiprocessing|pathlib|collections|threading|json)\..*"),
    (r"py:exc", r"\w+Error|\w+Warning|KeyboardInterrupt"),
]


def _found(module: str, name: str):
    """What ``name`` is, seen from inside a module, and the module that it was found in."""
    for base, parts in ((module, name.split(".")), *_splits(name)):
        try:
            found = importlib.import_module(base) if base else None
            for part in parts:
                found = getattr(found, part)
        except (ImportError, AttributeError):
            continue
        return found, base
    return None, ""


def _splits(name: str):
    parts = name.split(".")
    return ((".".join(parts[:i]), parts[i:]) for i in range(len(parts) - 1, 0, -1))


def _resolve(app, env, node, contnode):
    """A name as the module sees it, or as users import it, leads to where it is defined."""
    if "refwarn" not in node:  # the type in a signature, not a role that somebody wrote
        return contnode
    module, target = node.get("py:module") or "", node["reftarget"]
    scope = node.get("py:class")
    for name in (f"{scope}.{target}", target) if scope else (target,):
        found, base = _found(module, name)
        home = getattr(found, "__module__", None) or base
        if found is None or not home.startswith(project):
            continue
        defined = f"{home}.{getattr(found, '__qualname__', name.rsplit('.')[-1])}"
        domain, place = env.get_domain("py"), (env, node["refdoc"], app.builder)
        return domain.resolve_xref(
            *place, node["reftype"], defined, node, contnode
        ) or domain.resolve_xref(*place, "mod", home, node, contnode)
    return None


def _prose_types(app, doctree):
    """The types of parameters and fields are prose ("Tensor, [B, C]"), not names to look up."""
    for node in list(doctree.findall(addnodes.pending_xref)):
        if "refwarn" in node:  # a role that somebody wrote
            continue
        above = node.parent
        while above is not None and not isinstance(above, nodes.field):
            above = above.parent
        if above is not None or not node["reftarget"].startswith(f"{project}."):
            node.replace_self(node.children)


def _list_reexports(app, what, name, obj, options, lines):
    """What a package gives, at the end of its docstring."""
    if what != "module" or not hasattr(obj, "__path__") or not getattr(obj, "__all__", None):
        return
    lines += ["", "From here can be imported:", ""]
    for public in obj.__all__:
        found = getattr(obj, public)
        home, qualified = getattr(found, "__module__", ""), getattr(found, "__qualname__", "")
        linked = home.startswith(f"{project}.") and qualified
        lines.append(f"* :py:obj:`{public} <{home}.{qualified}>`" if linked else f"* ``{public}``")


def setup(app):
    app.connect("autodoc-process-docstring", _list_reexports)
    app.connect("doctree-read", _prose_types)
    app.connect("missing-reference", _resolve)
