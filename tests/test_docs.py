"""README and CONTRIBUTING are executed: commands, Python blocks, paths, links, the tree.

A block runs as it is pasted, or the HTML comment on the line before it says what it needs:

* `<!-- needs: gpu -->`: its commands' flags are read, nothing runs.
* `<!-- needs: hub -->`: it runs with a tiny model and a few rows in place of what the hub or the user would bring.
* `<!-- needs: run -->`: it looks at a finished run; its commands' flags are read, nothing runs.
* `<!-- needs: minutes -->`: as with hub, and only in `make test-long`.

`make` is only asked whether it knows the target.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from reference import forked
from reference.tiny_chain import save_base

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NEEDS = ("gpu", "hub", "minutes", "run")

# What stands in for what, in commands and in Python. The smoke config is the toy chain in miniature.
STAND_INS = {
    "recipes/configs/toy.yaml": "recipes/configs/smoke.yaml",
    "runs/toy": "runs/smoke",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny",
    ".venv/bin/python": sys.executable,
}
# Any file of rows that a document names and the repository lacks: rankings, and so demonstrations and prompts too.
ROWS = [
    {"prompt": f"Count to {n}.", "chosen": f"{n} is what I count to.", "rejected": "The lazy fox jumps over."}
    for n in range(24)
]
# Added to commands that train, and to configs in Python, unless the document's own value is smaller work anyway.
SMALLER = {
    "sft": {"epochs": 1, "batch_size": 8},
    "reward_model": {"epochs": 1, "prompts_per_batch": 8},
    "ppo": {"updates": 2, "rollout_size": 4, "minibatch_size": 2, "inner_epochs": 1, "max_new_tokens": 6},
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    file: Path
    line: int
    language: str
    needs: str | None
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """A list of words per command; continued lines are one, comments are none."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def blocks_of(file: Path) -> list[Block]:
    found, start, language, needs = [], 0, "", None
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip().startswith("```"):
            continue
        if start:
            found.append(Block(file, start, language, needs, "\n".join(lines[start : number - 1])))
            start = 0
        else:
            start, language = number, line.strip().removeprefix("```").strip()
            mark = re.fullmatch(r"<!-- needs: (\w+) -->", lines[number - 2].strip()) if number > 1 else None
            needs = mark[1] if mark else None
    assert not start, f"{file.name}:{start}: this block is never closed"
    return found


BLOCKS = [block for file in DOCS for block in blocks_of(file)]


def blocks(*languages: str) -> list[pytest.param]:
    """The documents' blocks in a language; those that need minutes are long tests."""
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.long] if block.needs == "minutes" else [])
        for block in BLOCKS
        if block.language in languages
    ]


def recipe_of(command: list[str]) -> tuple[str, list[str]] | None:
    """The recipe that a command runs and what it is given; None for other commands."""
    for place, word in enumerate(command):
        if re.fullmatch(r"(\S*/)?recipes/\w+\.py", word):
            return word[word.index("recipes/") :], command[place + 1 :]
    return None


def test_every_block_says_what_it_is():
    for block in BLOCKS:
        assert block.needs is None or block.needs in NEEDS, f"{block.name}: needs {block.needs}? One of {NEEDS}"
    marked = sum(block.needs is not None for block in BLOCKS)
    written = sum(len(re.findall(r"(?m)^\s*<!-- needs:", file.read_text(encoding="utf-8"))) for file in DOCS)
    assert marked == written, "a `needs` comment does not stand on the line before a block"


# ------------------------------------------------------------------------------------------------ commands


READ_FLAGS = """
import importlib, json, pathlib, sys
sys.path.insert(0, "recipes")
from rlhf import config as configs

class Read(Exception): pass

def load(cls, argv, *, _load=configs.load, **options):
    _load(cls, argv, **options)
    raise Read

configs.load = load
for where, recipe, argv in json.load(sys.stdin):
    try:
        importlib.import_module(pathlib.Path(recipe).stem).main(argv)
        print(f"{where}: {recipe} reads no config")
    except Read: pass
    except Exception as error: print(f"{where}: {recipe}: {type(error).__name__}: {error}")
"""


def commands_in_sources() -> list[tuple[str, list[str]]]:
    """Commands in the recipes' docstrings and the configs' headers."""
    found = []
    for file in [*ROOT.glob("recipes/*.py"), *ROOT.glob("recipes/configs/*.yaml")]:
        text = re.sub(r"\\+\n[# ]*", " ", file.read_text(encoding="utf-8"))
        for line in re.findall(r"^[# ]*((?:\S*/)?python3? recipes/.*)$", text, flags=re.MULTILINE):
            found.append((file.relative_to(ROOT).as_posix(), shlex.split(line, comments=True)))
    return found


def test_recipes_understand_every_command():
    """Every flag of every documented recipe command, in the documents, the docstrings and the configs' headers."""
    commands = [(block.name, command) for block in BLOCKS if block.language == "bash" for command in block.commands]
    recipes = [(name, *recipe) for name, command in commands + commands_in_sources() if (recipe := recipe_of(command))]
    for name, recipe, _ in recipes:
        assert (ROOT / recipe).is_file(), f"{name}: no {recipe}"
    assert len(recipes) > 5
    result = run([sys.executable, "-c", READ_FLAGS], ROOT, stdin=json.dumps(recipes))
    assert result.stdout == "", result.stdout


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=lambda b: b.name)
def test_commands_are_there(block):
    assert run(["bash", "-n"], ROOT, stdin=block.text).returncode == 0
    for command in block.commands:
        if command[0] == "make":
            asked = run(["make", "--dry-run", *command[1:]], ROOT)
            assert asked.returncode == 0, f"{block.name}: {asked.stderr}"


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_run(block, scratch):
    """In a folder like a fresh clone's. What needs the hub and no stand-in replaces is left to its flags' test."""
    for command in block.commands:
        words = [replaced(word) for word in command]
        if command[0] == "make" or block.needs in ("gpu", "run"):
            continue
        if recipe := recipe_of(words):
            script, given = recipe
            if "--config" in given and "smoke.yaml" not in given[given.index("--config") + 1]:
                continue
            words = [sys.executable, script, *given, *smaller_flags(Path(script).stem, given)]
        elif block.needs:
            continue
        provide_rows(" ".join(words), scratch)
        result = run(words, scratch)
        assert result.returncode == 0, f"{block.name}: {shlex.join(words)}\n{result.stdout}\n{result.stderr}"


def smaller_flags(name: str, given: list[str]) -> list[str]:
    """Flags win over the config, and the last one wins; the smoke config is small already."""
    if "--config" in given:
        return []
    return [word for key, value in SMALLER.get(name, {}).items() for word in (f"--{key}", str(value))]


# -------------------------------------------------------------------------------------------------- Python


SMALL_CONFIGS = """
import functools, reward_models, rlhf
from rlhf import console
console.quiet()

def smaller(config, settings):
    return lambda **given: config(**given | settings)

rlhf.SFTConfig = smaller(rlhf.SFTConfig, {sft})
rlhf.PPOConfig = smaller(rlhf.PPOConfig, {ppo})
reward_models.RewardConfig = smaller(reward_models.RewardConfig, {reward_model})
"""


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_python_runs(file, scratch):
    """A document's Python blocks, one after the other in one session, as a reader would paste them."""
    here = [block for block in BLOCKS if block.file == file and block.language == "python"]
    for block in here:
        compile(block.text, block.name, "exec")
    pasted = "\n".join(replaced(block.text) for block in here if block.needs in (None, "hub"))
    if re.search(r"\b(rlhf|reward_models)\b", pasted):
        pasted = SMALL_CONFIGS.format(**SMALLER) + pasted
    provide_rows(pasted, scratch)
    result = run([sys.executable, "-c", pasted], scratch)
    assert result.returncode == 0, f"{file.name}\n{result.stdout}\n{result.stderr}"


# ------------------------------------------------------------------------------------------ paths and links


PLACE = re.compile(r"`((?:rlhf|reward_models|data|recipes|tests|\.ci)/[\w./-]*)(?::\w+)?`")
LINK = re.compile(r"(?<!!)\[[^]]+\]\(([^)\s]+)\)|!\[[^]]*\]\(([^)\s]+)\)")


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_paths_exist(file):
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for place in PLACE.findall(text):
        assert (ROOT / place).exists(), f"{file.name}: `{place}` is not there"


@pytest.mark.parametrize("file", DOCS, ids=lambda file: file.name)
def test_links_resolve(file):
    for link in (first or second for first, second in LINK.findall(file.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        page = (file.parent / target) if target else file
        assert page.exists(), f"{file.name}: ({link}) leads nowhere"
        if anchor:
            assert anchor in anchors(page), f"{file.name}: ({link}): {page.name} has no such heading"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ------------------------------------------------------------------------------------------------ the tree


MADE = {"runs", "build", "dist", "__pycache__"}  # by running things: no part of the tree


def tree() -> set[str]:
    """Paths in README's tree: the first column (two spaces end it), nested by indentation."""
    shown = [b for b in BLOCKS if b.file.name == "README.md" and not b.language and "pyproject.toml" in b.text]
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
    """What the README's tree names exists, folders end in a slash, nothing at the top is missing, and where it names
    one Python file of a folder it names all of them."""
    named = tree()
    for name in named:
        there = (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file()
        assert there, f"README's tree: {name} is not there" + ("" if name.endswith("/") else " (or is a folder)")
    top = {path.name + "/" * path.is_dir() for path in ROOT.iterdir() if not path.name.startswith(".")}
    top = {name for name in top if name.rstrip("/") not in MADE and not name.endswith(".egg-info/")}
    assert top - named == set(), "missing in README's tree"
    for folder in {Path(name).parent for name in named if name.endswith(".py")}:
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py")}
        assert {f for f in files - named if not f.endswith("__init__.py")} == set(), "missing in README's tree"


# ------------------------------------------------------------------------------------------ what runs need


def replaced(text: str) -> str:
    for theirs, ours in STAND_INS.items():
        text = text.replace(theirs, ours)
    return text


def provide_rows(text: str, folder: Path) -> None:
    """A few rows in every file of rows that the text names and that isn't there."""
    for name in set(re.findall(r"[\w./-]+\.jsonl\b", text)):
        path = folder / name
        if not path.exists() and not name.startswith("runs/"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")


def run(command: list[str], folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """As a user would, but without a network: stdout, stderr and the exit status."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    if command[0] == sys.executable:  # without the seconds of its imports
        return forked.shared().run(command[1:], cwd=folder, stdin=stdin, limit=900)
    return subprocess.run(
        command, cwd=folder, input=stdin, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A folder that looks like the repository's root; all commands share it, in their order."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "data", "rlhf", "reward_models", "README.md", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def scratch(clone, tiny_model, tiny_tokenizer) -> Path:
    """The clone, with a tiny model in its folder `tiny`."""
    if not (clone / "tiny").exists():
        save_base(clone, tiny_model, tiny_tokenizer).rename(clone / "tiny")
    return clone
