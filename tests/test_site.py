"""The documentation site: its API page names every public name, its menu every guide; it builds without a warning."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from reference.documents import GUIDES, ROOT

PAGE = ROOT / "recipes" / "guides" / "api.md"
WHOLE = [
    "rlhf", "reward_models", "rlhf.ppo.math", "rlhf.ppo.rollout", "rlhf.rows.records", "rlhf.chat", "rlhf.evaluate",
    "rlhf.sampling.engine", "reward_models.functions", "reward_models.rules", "reward_models.grader",
    "reward_models.losses",
]  # fmt: skip
"""Modules of which every public name is listed; of others, the page chooses."""


def listed() -> dict[str, list[str]]:
    """Return module -> names, from the page's `::: module` blocks and their `members`, or `::: module.Name`."""
    text, found = PAGE.read_text(encoding="utf-8"), {}
    for module, options in re.findall(r"^::: (\S+)\n((?: {4}.*\n)*)", text, flags=re.MULTILINE):
        members = re.search(r"members: \[(.*)\]", options)
        owner, _, name = (module, "", "") if members else module.rpartition(".")
        names = re.split(r",\s*", members[1]) if members else [name]
        found.setdefault(owner, []).extend(names)
    return found


def public_names(module: str) -> list[str]:
    """Return the classes and functions in a module's `__all__`, or those that it defines without an underscore."""
    loaded = importlib.import_module(module)
    every = {name: getattr(loaded, name) for name in getattr(loaded, "__all__", dir(loaded)) if name[0] != "_"}
    kinds = {name: value for name, value in every.items() if inspect.isclass(value) or inspect.isfunction(value)}
    return [name for name, value in kinds.items() if hasattr(loaded, "__all__") or value.__module__ == loaded.__name__]


@pytest.mark.parametrize("module", WHOLE)
def test_every_public_name_is_listed(module):
    names = {name for names in listed().values() for name in names}
    missing = set(public_names(module)) - names
    assert missing == set(), f"recipes/guides/api.md: {module}: {sorted(missing)}"


def test_what_is_listed_is_there_and_has_a_docstring():
    for module, names in listed().items():
        for name in names:
            value = getattr(importlib.import_module(module), name)
            assert inspect.getdoc(value), f"{module}.{name}"
            assert len(names) == len(set(names)), f"{module}: a name twice"


def test_the_menu_leads_to_every_guide():
    menu = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    tomllib.loads(menu)
    for page in re.findall(r'"([\w/]+\.md)"', menu):
        assert (ROOT / page).is_file(), page
    for guide in GUIDES:
        assert f'"{guide.relative_to(ROOT).as_posix()}"' in menu, guide.name


@pytest.mark.long
@pytest.mark.skipif(find_spec("zensical") is None, reason="needs pip install 'rlhf-recipes[docs]'")
def test_it_builds_without_a_warning(tmp_path: Path):
    """Run `make docs` in a copy: strict, so a warning is an error."""
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "zensical.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("rlhf", "reward_models", "data", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "README.md", tmp_path / "tests")
    made = subprocess.run(
        ["make", "docs", f"PY={sys.executable}", "-o", ".venv/installed-docs"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = made.stdout + made.stderr
    assert made.returncode == 0, said
    assert "No issues found" in said
    assert "warning" not in said.lower()
    page = (tmp_path / "build/site/recipes/guides/api/index.html").read_text(encoding="utf-8")
    for module, names in listed().items():
        for name in names:
            assert f'id="{module}.{name}"' in page, f"{module}.{name} is not on the built page"
    links = re.findall(r'(?:src|href)="(https?://[^"]+)"', page)
    assert not [link for link in links if "font" in link or ".js" in link], "the site opens without a network"
