"""Bugs of released PPO trainers: each, planted in a copy of the repository, makes the test named for it fail.

The table is in `reference/planted_bugs.py`; tests/README.md shows it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference import planted_bugs
from reference.forked import LIBRARIES, Forker
from reference.planted_bugs import PLANTS, Plant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("rlhf", "reward_models", "tests", "recipes", "data", "pyproject.toml")
PYTEST = "import sys, pytest; sys.dont_write_bytecode = True; sys.exit(pytest.main(sys.argv[1:]))"
every_plant = pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
# A plant that breaks the program shows nothing: any test would fail under it.
BROKEN = re.compile(r"^E +(NameError|AttributeError|TypeError|KeyError|UnboundLocalError|\w*ImportError)", re.MULTILINE)


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@every_plant
def test_a_plant_fits_the_sources(plant):
    text = (ROOT / plant.file).read_text(encoding="utf-8")
    assert text.count(plant.old) == 1, f"{plant.file} must hold this once, to be replaced: {plant.old!r}"
    compile(plant.planted(text), plant.file, "exec")
    assert ast.dump(ast.parse(plant.planted(text))) != ast.dump(ast.parse(text))
    file, name = plant.test.split("::")
    assert name.split("[")[0] in functions(file), f"{plant.test} is not there"


def test_plants_have_names_of_their_own():
    assert len({plant.name for plant in PLANTS}) == len(PLANTS)
    assert len({(plant.file, plant.old, plant.new) for plant in PLANTS}) == len(PLANTS)


def test_the_readmes_table_is_the_one_that_the_plants_make(tmp_path):
    readme, again = ROOT / "tests/README.md", tmp_path / "README.md"
    shutil.copy(readme, again)
    planted_bugs.main(str(again))
    text = readme.read_text(encoding="utf-8")
    assert again.read_text(encoding="utf-8") == text, "run: python tests/reference/planted_bugs.py tests/README.md"
    assert all(text.count(f"| {plant.bug} |") == 1 for plant in PLANTS)


class Copy:
    """A copy of the repository with a process that runs tests in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder / name)
        self.forks = Forker(LIBRARIES, cwd=folder)  # no test and none of our modules is imported there

    def run(self, *tests: str) -> tuple[int, str]:
        """Run a test; return pytest's exit status and its output."""
        environment = {
            "PYTHONPATH": f"{self.folder}{os.pathsep}{self.folder / 'tests'}",
            "PYTHONDONTWRITEBYTECODE": "1",  # bytecode is told by its source's second and size: a plant may share both
        }
        argv = ["-c", PYTEST, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-rfE", "-m", "", *tests]
        done = self.forks.run(argv, cwd=self.folder, env=environment)
        return done.returncode, done.stdout + done.stderr

    def run_planted(self, plant: Plant) -> tuple[int, str]:
        file = self.folder / plant.file
        whole = file.read_text(encoding="utf-8")
        file.write_text(plant.planted(whole), encoding="utf-8")
        try:
            return self.run(plant.test)
        finally:
            file.write_text(whole, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Iterator[Copy]:
    made = Copy(tmp_path_factory.mktemp("copy"))
    yield made
    made.forks.close()


@pytest.mark.long
def test_without_a_plant_the_named_tests_pass(copy):
    status, output = copy.run(*sorted({plant.test for plant in PLANTS}))
    assert status == 0, output[-5000:]


@pytest.mark.long
@every_plant
def test_a_planted_bug_is_caught(copy, plant):
    status, output = copy.run_planted(plant)
    assert status == 1, f"{plant.test} should fail: {output[-3000:]}"  # 2 and more: pytest itself could not run it
    assert re.search(rf"^FAILED {re.escape(plant.test)}", output, re.MULTILINE), output[-3000:]
    assert not re.search(r"^ERROR ", output, re.MULTILINE), output[-3000:]
    assert not BROKEN.search(output), output[-3000:]
