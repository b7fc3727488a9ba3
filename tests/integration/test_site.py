"""The documentation site builds, API included, without a warning, and its links within lead somewhere."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import pytest

# Sphinx and its extensions warn each other of their next versions.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def site(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in this process, where fairchem, which the API's docstrings need, is imported already or once."""
    for package in ("sphinx", "furo", "myst_parser"):
        pytest.importorskip(package, reason='the site needs the extra docs: pip install -e ".[docs]"')
    from sphinx.application import Sphinx

    folder = tmp_path_factory.mktemp("site")
    warnings = io.StringIO()
    app = Sphinx(repo / "docs", repo / "docs", folder, folder / ".doctrees", "html", status=None, warning=warnings)
    app.build()
    assert warnings.getvalue() == ""
    assert app.statuscode == 0
    return folder


def test_pages(site: Path, repo: Path) -> None:
    """Every page of docs is there and in the menu; none shows the marks of what it was written in."""
    start = (site / "index.html").read_text()
    for page in (repo / "docs").glob("*.md"):
        text = (site / f"{page.stem}.html").read_text()
        assert page.stem == "index" or f'href="{page.stem}.html"' in start, page.stem
        prose = re.sub(r"<(pre|code|script|style|dt).*?</\1>", "", text, flags=re.DOTALL)
        prose = html.unescape(re.sub(r"<[^>]*>", "", prose))
        assert not re.search(r"\]\(|^#+ |\*\*|``|:\w+:`|\|--", prose, re.MULTILINE), page.stem


def test_links(site: Path) -> None:
    """Anchors and files that the pages point at."""
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    found = 0
    for name, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            if re.match(r"\w+:|//", link):
                continue
            path, _, anchor = html.unescape(link).partition("#")
            target = site / path.split("?")[0] if path else site / name
            assert target.exists(), f"{name}: {link}"
            if anchor and target.suffix == ".html" and target.parent == site:
                assert f'id="{anchor}"' in pages[target.name], f"{name}: {link}"
                found += 1
    assert found > 100


def test_api(site: Path) -> None:
    """Docstrings with their arguments and errors."""
    text = (site / "api.html").read_text()
    for name in ("e2former_fairchem.train", "e2former_fairchem.backbone.E2FormerV2Backbone"):
        entry = text.split(f'id="{name}"')[1].split("</dl>\n</dd></dl>")[0]
        assert "Parameters" in entry and "Raises" in entry, name
