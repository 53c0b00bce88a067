"""README, CONTRIBUTING and the guides are executed: commands, Python blocks, configs.

A block runs as it is pasted, or the HTML comment on the line before it says what it needs:

* `<!-- needs: gpu -->`: a GPU, a server, a network or an hour: its commands' flags are read, nothing runs.
* `<!-- needs: hub -->`: it runs with a tiny model and a few rows in place of what the hub or the user would bring.
* `<!-- needs: minutes -->`: as with hub, and only in `make test-long`.

A YAML block is read as a chain's config. `make` is only asked whether it knows the target.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from reference import forked, recipe, whole_chain
from reference.documents import (
    BLOCKS,
    DOCS,
    NEEDS,
    ROOT,
    SMALLER,
    Block,
    configs,
    provide_files,
    recipe_of,
    replaced,
    smaller_flags,
)
from reference.tiny_chain import save_base, save_reward_model

from rlhf.config import load, to_dict
from rlhf.run.changes import changes


def blocks(*languages: str) -> list[pytest.param]:
    """Return the documents' blocks in a language; those that need minutes are long tests, the guides' slow ones."""
    found = [block for block in BLOCKS if block.language in languages]
    return [pytest.param(block, id=block.name, marks=marks(block)) for block in found]


def marks(block: Block) -> list[pytest.MarkDecorator]:
    if block.needs == "minutes":
        return [pytest.mark.long]
    return of_guide(block.name)


def of_guide(name: str) -> list[pytest.MarkDecorator]:
    return [] if name.startswith(("README", "CONTRIBUTING")) else [pytest.mark.slow]


def test_every_block_says_what_it_is():
    for block in BLOCKS:
        assert block.needs is None or block.needs in NEEDS, f"{block.name}: needs {block.needs}? One of {NEEDS}"
    marked = sum(block.needs is not None for block in BLOCKS)
    written = sum(len(re.findall(r"(?m)^\s*<!-- needs:", file.read_text(encoding="utf-8"))) for file in DOCS)
    assert marked == written, "a `needs` comment does not stand on the line before a block"


# ------------------------------------------------------------------------------------------------ commands


READ_FLAGS = """
import json, sys
from rlhf import cli, config as configs
from rlhf_recipes import stage

class Read(Exception): pass

def load(cls, argv, *, _load=configs.load, **options):
    _load(cls, argv, **options)
    raise Read

configs.load = load
for where, (name, *words) in json.load(sys.stdin):
    try:
        cli.command([name, *cli.split_launch_flags(words)[1]])
        if name in cli.commands(): print(f"{where}: {name} reads no config")
    except Read: pass
    except SystemExit as end:
        if end.code: print(f"{where}: {name}: exit code {end.code}")
    except Exception as error: print(f"{where}: {name}: {type(error).__name__}: {error}")
"""


def commands_in_sources() -> list[tuple[str, list[str]]]:
    """Return the commands in the recipes' docstrings and the configs' headers."""
    found = []
    for file in [*ROOT.glob("recipes/*.py"), *ROOT.glob("recipes/configs/**/*.yaml")]:
        text = re.sub(r"\\+\n[# ]*", " ", file.read_text(encoding="utf-8"))
        for line in re.findall(r"^[# ]*(rlhf \w+ .*|(?:\S*/)?python3? recipes/.*)$", text, flags=re.MULTILINE):
            if recipe := recipe_of(shlex.split(line, comments=True)):
                found.append((file.relative_to(ROOT).as_posix(), recipe))
    return found


@pytest.mark.slow
def test_recipes_understand_every_command(tmp_path):
    """Every flag of every documented command, in the documents, the docstrings and the configs' headers; and every
    YAML block, as a chain's config."""
    asked = [
        (block.name, recipe)
        for block in BLOCKS
        if block.language == "bash"
        for command in block.commands
        if (recipe := recipe_of(command))
    ]
    asked += commands_in_sources()
    assert len(asked) > 40
    for name, text in configs().items():
        (tmp_path / name).write_text(text)
    for number, block in enumerate(block for block in BLOCKS if block.language == "yaml"):
        (tmp_path / f"block_{number}.yaml").write_text(block.text)
        asked.append((block.name, ["chain", "--config", f"block_{number}.yaml"]))
    asked = [(where, words) for where, words in asked if "--help" not in words and words[0] not in ("list", "copy")]
    result = run([sys.executable, "-c", READ_FLAGS], tmp_path, stdin=json.dumps(asked))
    assert result.stdout == "", result.stdout
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=lambda b: b.name)
def test_commands_are_there(block):
    assert run(["bash", "-n"], ROOT, stdin=block.text).returncode == 0
    for command in block.commands:
        if command[0] == "make":
            asked = run(["make", "--dry-run", *command[1:]], ROOT)
            assert asked.returncode == 0, f"{block.name}: {asked.stderr}"


def test_a_folder_is_made_by_one_command():
    """A reader of several guides is never refused a folder of another guide's run."""
    made: dict[str, tuple[str, list[str]]] = {}
    for block in BLOCKS:
        for words in filter(None, map(recipe_of, block.commands if block.language == "bash" else ())):
            if "--output_dir" in words:
                folder = words[words.index("--output_dir") + 1]
                where, first = made.setdefault(folder, (block.name, words))
                assert words == first, f"{block.name} and {where} make {folder} by different commands"


def test_the_line_of_a_chain_that_is_refused_is_as_the_guide_has_it():
    guide = (ROOT / "recipes" / "guides" / "resume.md").read_text(encoding="utf-8")
    flags = ["--sft.epochs", "3", "--ppo.kl_coef", "0.2"]
    chain = recipe.load("chain").ChainConfig
    before, now = (to_dict(load(chain, ["--config", "toy.yaml", *given])) for given in ([], flags))
    for stage in ("sft", "ppo"):
        (change,) = changes({"config": before[stage]}, {"config": now[stage]})
        assert f"{stage}: {change}; " in guide


def test_what_serves_is_installed_first():
    serving = ("serve_policy", "serve_reward_model", "label")
    for file in DOCS:
        shell = [block for block in BLOCKS if block.file == file and block.language == "bash"]
        here = [words for block in shell for words in block.commands]
        first = next((n for n, words in enumerate(here) if (recipe_of(words) or [""])[0] in serving), None)
        installed = ["pip", "install", "rlhf-recipes[server]"]
        assert first is None or installed in here[:first], f"{file.name}: {here[first or 0]} without {installed}"


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_run(block, scratch, tmp_path_factory):
    """Run in a folder like a fresh clone. A command that needs the hub and has no stand-in is only tested for its
    flags."""
    folder = scratch(block.file)
    for command in block.commands:
        if command[0] == "make" or block.needs == "gpu":
            continue
        words = shlex.split(replaced(shlex.join(command)))
        if recipe := recipe_of(words):
            name, *flags = recipe
            if "--config" in flags and flags[flags.index("--config") + 1] != "smoke.yaml":
                continue
            words = [sys.executable, "-m", "rlhf.cli", name, *flags, *smaller_flags(name, flags)]
        elif block.needs:
            continue
        provide_files(" ".join(words), folder)
        provide_models(words, folder)
        if "smoke.yaml" in words and not (folder / "runs" / "smoke").exists():
            finished = whole_chain.undisturbed(tmp_path_factory)
            shutil.copytree(finished, folder / "runs" / "smoke", copy_function=shutil.copy2)
        result = run(words, folder)
        assert result.returncode == 0, f"{block.name}: {shlex.join(words)}\n{result.stdout}\n{result.stderr}"


# -------------------------------------------------------------------------------------------------- Python


SMALL_CONFIGS = """
import reward_models, rlhf
from rlhf.run import console
console.quiet()

def smaller(config, settings):
    return lambda **given: config(**given | settings)

rlhf.SFTConfig = smaller(rlhf.SFTConfig, {sft})
rlhf.PPOConfig = smaller(rlhf.PPOConfig, {ppo})
reward_models.RewardConfig = smaller(reward_models.RewardConfig, {reward_model})
"""


@pytest.mark.parametrize("file", [pytest.param(file, id=file.name, marks=of_guide(file.name)) for file in DOCS])
def test_python_runs(file, scratch):
    """A document's Python blocks, one after the other in one session, as a reader would paste them."""
    here = [block for block in BLOCKS if block.file == file and block.language == "python"]
    for block in here:
        compile(block.text, block.name, "exec")
    pasted = "\n".join(replaced(block.text) for block in here if block.needs in (None, "hub"))
    if not pasted:
        return
    folder = scratch(file)
    provide_files(pasted, folder)
    if file.stem == "using_the_result":  # what its commands made; alone, this test must make it
        if not (folder / "my_policy").exists():
            made = next(block for block in BLOCKS if block.file == file and "--output_dir my_policy" in block.text)
            test_commands_run(made, scratch, None)
        provide(folder / "my_reward_model", "reward_model")
    result = run([sys.executable, "-c", SMALL_CONFIGS.format(**SMALLER) + pasted], folder)
    assert result.returncode == 0, f"{file.name}\n{result.stdout}\n{result.stderr}"


# ------------------------------------------------------------------------------------------ what runs need


def run(command: list[str], folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, without a network; return stdout, stderr and the exit status."""
    if command[0] == sys.executable:  # without the seconds of its imports
        return forked.shared().run(command[1:], cwd=folder, stdin=stdin, limit=900)
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        command, cwd=folder, input=stdin, env=os.environ | settings, capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[Path, Path]:
    return {}


@pytest.fixture
def scratch(folders, tmp_path_factory, tiny_model, tiny_tokenizer):
    """Return the function from a document to the folder that its blocks share, like a clone with a tiny model in
    `tiny`."""

    def folder_of(file: Path) -> Path:
        if file not in folders:
            folder = folders[file] = tmp_path_factory.mktemp(file.stem)
            for name in ("recipes", "data", "rlhf", "reward_models", "README.md", "pyproject.toml"):
                (folder / name).symlink_to(ROOT / name)
            for name, text in configs().items():
                (folder / name).write_text(text)
            tiny_model.config.max_position_embeddings = 4096  # a rubric's question is long in this vocabulary
            save_base(folder, tiny_model, tiny_tokenizer).rename(folder / "tiny")
            save_reward_model(folder, folder / "tiny", tiny_tokenizer).rename(folder / "tiny_reward_model")
        return folders[file]

    return folder_of


MODELS = {"--model": "sft", "--policy": "sft", "--baseline": "sft", "--reward_model": "reward_model",
          "--judge": "reward_model", "--scorers": "reward_model"}  # fmt: skip


def provide_models(words: list[str], folder: Path) -> None:
    """Put a tiny model at every path that a command reads and no earlier command of its document made."""
    for flag, value in itertools.pairwise(words):
        if flag in MODELS and value.startswith("runs/"):
            provide(folder / value, MODELS[flag])


def provide(path: Path, kind: str) -> None:
    if not path.exists():
        tiny = next(parent / "tiny" for parent in path.parents if (parent / "tiny").exists())
        shutil.copytree(tiny if kind == "sft" else tiny.with_name("tiny_reward_model"), path)
