"""How Sphinx builds these pages: `make docs`.

The source is the root of the repository, so that links from a page to the README, a bench or a kept result lead there on
disk and on the site alike. Sphinx, because our docstrings are written for it: it resolves what they refer to.
"""

from __future__ import annotations

import adaskip_compile

project = "adaskip-compile"
version = release = adaskip_compile.__version__
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md", "bench/*.md", "bench/results/*.md"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # docstrings that the command line prints, too, mark code with single backticks
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}

html_theme = "furo"
html_title = "adaskip-compile"
