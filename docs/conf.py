"""The documentation site: `pip install -e ".[docs]"`, then `sphinx-build docs FOLDER`."""

import importlib.metadata
import json
from pathlib import Path

project = "e2former-fairchem"
author = copyright = "The e2former-fairchem authors"
release = importlib.metadata.version("e2former-fairchem")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the anchors that GitHub gives, so that links work in both places
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["images", "_static"]

autodoc_member_order = "bysource"
default_role = "code"  # docstrings have single backticks

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_title = f"e2former-fairchem {release}"
html_copy_source = False
html_show_sphinx = False


def notebook_as_page(app, docname, source):
    """A notebook is a page of its cells; it has no outputs, so that nothing of nbsphinx or myst-nb is needed."""
    if Path(app.env.doc2path(docname)).suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(source[0])["cells"]]
        source[0] = "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", notebook_as_page)
