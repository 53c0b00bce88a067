"""Links, paths, the tree and quoted errors in the documents are true; every page is short and can be reached."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from reference.documents import BLOCKS, DOCS, GUIDES, README, ROOT


def test_sizes():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    for guide in GUIDES:
        assert len(guide.read_text(encoding="utf-8").splitlines()) <= 260, f"{guide.name}: divide it"


# ------------------------------------------------------------------------------------------ paths and links


PLACE = re.compile(r"`((?:rlhf|reward_models|data|recipes|tests|\.ci)/[\w./-]*)(?::\w+)?`")
LINK = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")


def links(file: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = (first or second for first, second in LINK.findall(text))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_paths_exist(file):
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for place in PLACE.findall(text):
        assert (ROOT / place).exists(), f"{file.name}: `{place}` is not there"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_resolve(file):
    for link in links(file):
        target, _, anchor = link.partition("#")
        page = (file.parent / target).resolve() if target else file
        assert page.exists(), f"{file.name}: ({link}) leads nowhere"
        if anchor:
            assert anchor in anchors(page), f"{file.name}: ({link}): {page.name} has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_leads_to_every_guide():
    """Every guide is at most two clicks from README."""
    seen = {README}
    for _ in range(2):
        seen |= {
            (page.parent / link.partition("#")[0]).resolve() for page in seen if page in DOCS for link in links(page)
        }
    assert set(GUIDES) - seen == set()


# ------------------------------------------------------------------------------------- errors that are quoted


def sentences() -> set[str]:
    """Return every string in the sources, with `...` in place of values."""
    found = set()
    for file in [*ROOT.glob("rlhf/**/*.py"), *ROOT.glob("reward_models/**/*.py"), *ROOT.glob("recipes/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.add(re.sub(r"%(\.\d\w|\w)", "...", "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%(\.\d\w|\w)", "...", node.value))
    return found


def test_quoted_errors_are_in_the_sources():
    """In the first column of troubleshooting's tables, the text in backticks, between `...`, is in the sources."""
    page = next(guide for guide in GUIDES if guide.stem == "troubleshooting")
    rows = re.findall(r"^\| (`.+?`)[^|]*\|", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) > 30
    known = sentences()
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row):
            pieces = sorted((piece.strip(" :;,'") for piece in quoted.split("...")), key=len)
            found = [piece for piece in pieces if len(piece) > 7 and any(piece in sentence for sentence in known)]
            assert found or len(pieces[-1]) < 15, f"no source says {quoted!r}"
            assert all(piece in found for piece in pieces if len(piece) > 25), f"not all of {quoted!r} is said"


# ------------------------------------------------------------------------------------------------ the tree


MADE = {"runs", "build", "dist", "__pycache__"}  # by running things: no part of the tree


def tree() -> set[str]:
    """Return the paths in README's tree: the first column (two spaces end it), nested by indentation."""
    shown = [b for b in BLOCKS if b.file == README and not b.language and "pyproject.toml" in b.text]
    assert len(shown) == 1, "README shows its tree in one block without a language, pyproject.toml among the files"
    paths, parents = set(), [(-1, "")]
    for line in re.sub(r"[│├└─]", " ", shown[0].text).splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent > 8:  # a description that goes on
            continue
        names = re.split(r"\s{2,}", line.strip())[0].replace(",", " ").split()
        while indent <= parents[-1][0]:
            parents.pop()
        paths |= {parents[-1][1] + name for name in names}
        if names[0].endswith("/"):
            parents.append((indent, parents[-1][1] + names[0]))
    return paths


def test_tree_is_true():
    """Every path in README's tree exists and folders end in a slash; the tree has every top-level folder, room of the
    library and folder of the recipes."""
    named = tree()
    for name in named:
        there = (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()
        assert there, f"README's tree: {name} is not there" + ("" if name.endswith("/") else " (or is a folder)")
    top = {path.name + "/" * path.is_dir() for path in ROOT.iterdir() if not path.name.startswith(".")}
    top = {name for name in top if name.rstrip("/") not in MADE and not name.endswith(".egg-info/")}
    assert top - named == set(), "missing in README's tree"
    for folder in ("rlhf", "reward_models", "recipes", "data"):
        rooms = {f"{folder}/{path.name}/" for path in (ROOT / folder).iterdir() if path.is_dir()}
        assert {room for room in rooms - named if "__pycache__" not in room} == set(), "missing in README's tree"
