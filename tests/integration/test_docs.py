"""What README and docs point at is there: files, pictures, configs, sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.*") if page.suffix in (".md", ".ipynb")),
]


def sections(page: Path) -> set[str]:
    """Anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str, repo: Path) -> None:
    page = repo / name
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in sections(target), f"{name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_configs_and_commands(name: str, repo: Path) -> None:
    from e2former_fairchem.cli import COMMANDS

    text = (repo / name).read_text()
    for config in set(re.findall(r"(?<!/)\bconfigs/[\w/]+\.yaml", text)):
        theirs = config.startswith(("configs/uma/", "configs/allscaip/", "configs/esen/"))
        assert theirs or (repo / config).is_file(), f"{name}: {config}"
    commands = set(re.findall(r"^ *e2former-fairchem ([\w-]+)", text, flags=re.MULTILINE))
    assert commands <= set(COMMANDS), f"{name}: {commands - set(COMMANDS)}"


#: "section 6.2", "sections 2 to 8", "equations 3.5 and 3.6": the kind, and the numbers behind it.
NUMBERS = r"(section|equation)s? (\d+(?:\.\d+)?(?:(?:,| and| to) \d+(?:\.\d+)?)*)"


def numbered(page: Path) -> dict[str, list[str]]:
    """Numbers of the sections and equations of a page."""
    text = page.read_text()
    headings = re.findall(r"^#{2,3} (\d+(?:\.\d+)?) ", text, flags=re.MULTILINE)
    return {"section": headings, "equation": re.findall(r"\\tag\{([^}]*)\}", text)}


def test_citations_of_the_network_exist(repo: Path) -> None:
    """Whoever cites docs/network.md names a section or an equation that is there; so does the page itself."""
    known = numbered(repo / "docs" / "network.md")
    for kind, numbers in known.items():
        assert numbers, kind
        assert len(set(numbers)) == len(numbers), f"{kind}s twice: {numbers}"
    cited = 0
    folders = ("e2former_fairchem", "kernels", "tests", "configs")
    for path in (path for folder in folders for kind in ("*.py", "*.yaml") for path in (repo / folder).rglob(kind)):
        text = re.sub(r"\s+(#:? )?", " ", path.read_text())  # a citation may go over the end of a line
        assert not re.search(r"\bSPEC\b", text), f"{path}: cites a specification that is not in the repository"
        for citation in re.finditer(r"docs/network\.md(?!\")", text):
            found = re.match(f", {NUMBERS}", text[citation.end() :])
            assert found or path.name == "test_docs.py", f"{path}: {text[citation.start() :][:60]!r} gives no number"
            if found:
                cited += 1
                missing = set(re.findall(r"[\d.]*\d", found[2])) - set(known[found[1]])
                assert not missing, f"{path}: docs/network.md has no {found[1]} {sorted(missing)}"
    assert cited > 40, cited
    for name in ("network.md", "architecture.md"):
        page = " ".join((repo / "docs" / name).read_text().split())
        pairs = r"\((\d{1,2}\.\d{1,2}(?:,? (?:to )?\d{1,2}\.\d{1,2})*)\)"  # (6.10), (6.1, 6.2), (4.1 to 4.3)
        own = re.findall(NUMBERS, page) + [("equation", numbers) for numbers in re.findall(pairs, page)]
        assert own, name
        for kind, numbers in own:
            assert set(re.findall(r"[\d.]*\d", numbers)) <= set(known[kind]), f"docs/{name}: {kind} {numbers}"


def expanded(name: str) -> list[str]:
    """Names that braces stand for: ``a/{b,c}.py``."""
    braces = re.fullmatch(r"(.*)\{([^}]*)\}(.*)", name)
    return [name] if braces is None else [braces[1] + part + braces[3] for part in braces[2].split(",")]


@pytest.mark.parametrize("name", ["docs/architecture.md", "docs/network.md"])
def test_files_and_names_that_pages_mention_exist(name: str, repo: Path) -> None:
    """Files by path, by their last part or by a pattern; classes, functions and constants by name."""
    roots = [repo, repo / "kernels" / "e2former_kernels", repo / "e2former_fairchem"]
    sources = {path: path.read_text() for root in roots[1:] for path in root.rglob("*.py")}
    sources |= {
        path: path.read_text() for folder in ("tests", "kernels/benchmarks") for path in (repo / folder).rglob("*.py")
    }
    words = set(re.findall(r"\w+", " ".join(sources.values())))
    files = names = 0
    for token in set(re.findall(r"`([^`\n]+)`", (repo / name).read_text())):
        if re.fullmatch(r"[\w/.{},*-]+\.(py|yaml|md|toml)", token) or re.fullmatch(r"\w+(/\w+)+", token):
            for path in expanded(token):
                there = any(any(root.glob(path)) for root in roots) or (
                    "/" not in path and any(repo.glob(f"*/**/{path}"))
                )
                assert there, f"{name}: {path} is not there"
                files += 1
        elif re.fullmatch(r"\w{4,}", token) and ("_" in token or re.search(r"[a-z][A-Z]", token)):
            assert token in words, f"{name}: nothing is called {token}"
            names += 1
    assert files > 5, files
    assert names > 20, names
