"""The documentation site: `pip install -e ".[docs]"`, then `sphinx-build docs FOLDER`."""

import importlib.metadata

project = "e2former-fairchem"
author = copyright = "The e2former-fairchem authors"
release = importlib.metadata.version("e2former-fairchem")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the anchors that GitHub gives, so that links work in both places
exclude_patterns = ["images", "_static"]

autodoc_member_order = "bysource"
default_role = "code"  # docstrings have single backticks

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"e2former-fairchem {release}"
html_copy_source = False
html_show_sphinx = False
