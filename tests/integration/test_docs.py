"""What README and docs point at is there: files, pictures, configs, sections."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = ("README.md", "docs/workflows.md", "docs/leaderboard.md")


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
    for config in set(re.findall(r"\bconfigs/[\w/]+\.yaml", text)):
        theirs = config.startswith(("configs/uma/", "configs/allscaip/", "configs/esen/"))
        assert theirs or (repo / config).is_file(), f"{name}: {config}"
    commands = set(re.findall(r"^ *e2former-fairchem ([\w-]+)", text, flags=re.MULTILINE))
    assert commands <= set(COMMANDS), f"{name}: {commands - set(COMMANDS)}"
