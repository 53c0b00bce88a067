"""One YAML serves every command: each shipped config is read by each command that takes --config, from its section."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
from reference import recipe

import rlhf.config
from rlhf.errors import InputError
from rlhf.hints import hints_of
from rlhf_recipes.chain import ChainConfig
from rlhf_recipes.ending import JudgeStageConfig, judge_steps
from rlhf_recipes.ppo import PPORecipe
from rlhf_recipes.stage import SECTIONS

RECIPES = recipe.ROOT / "recipes"
FILES = sorted((RECIPES / "configs").glob("*.yaml"))
COMMANDS = sorted(file.stem for file in RECIPES.glob("*.py") if '__name__ == "__main__"' in file.read_text())
FLAGS = {
    "baseline": "--method=dpo",
    "best_of_n": "--model=m --data=d --scorers=s",
    "chat": "runs/x",
    "collected": "status --store=s",
    "ensemble": "--members=m,n --data=d",
    "evaluate_reward_model": "--reward_model=m --data=d",
    "import_gguf": "--file=f",
    "inspect_rollout": "runs/x",
    "label": "--store=s",
    "moderation": "--model=m --eval_data=d",
    "monitor": "--store=s",
    "predict_capability": "--data=d --at=1",
    "push_to_hub": "--model=m --repo=a/b",
    "report": "runs/x",
    "run_evals": "--eval_data=d",
    "serve_policy": "--model=m",
    "serve_reward_model": "--reward_model=m",
    "synthetic": "--model=m --data=d",
    "system_card": "runs/x",
}
"""What a command's own line must hold, because no section of a shipped config gives it."""


class Read(Exception):
    """The config that a command has read, before it does anything with it."""


@pytest.fixture
def only_read(monkeypatch: pytest.MonkeyPatch) -> None:
    load = rlhf.config.load

    def stop(*args: Any, **settings: Any) -> NoReturn:
        raise Read(load(*args, **settings))

    monkeypatch.setattr(rlhf.config, "load", stop)


def main_of(name: str) -> Any:
    return (recipe.load_benchmark("ppo_vs_trl") if name == "benchmark" else recipe.load(name)).main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_shipped_config_is_read_by_every_command(only_read: None, command: str) -> None:
    refused = {}
    for file in FILES:
        try:
            main_of(command)([*FLAGS.get(command, "").split(), "--config", str(file)])
        except Read:
            continue
        except InputError as error:
            refused[file.name] = str(error)
    assert refused == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_sections_of_other_commands_are_left_alone(only_read: None, tmp_path: Path, command: str) -> None:
    """Those that the chain doesn't read; each command finds its own among them."""
    others = [name for name in SECTIONS if name not in hints_of(ChainConfig)]
    assert {"baseline", "moderation", "label", "chat", "report"} < {*others}
    file = tmp_path / "my.yaml"
    file.write_text("output_dir: runs/x\n" + "".join(f"{name}: {{}}\n" for name in others))
    with pytest.raises((Read, InputError)) as told:
        main_of(command)([*FLAGS.get(command, "").split(), "--config", str(file)])
    assert told.type is Read, told.value


def test_a_mistyped_section_of_another_command_and_its_flags_are_refused_by_the_chain(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("sft: {}\nmodration:\n  epochs: 1\n")
    told = recipe.run("chain", "--config", file)
    assert (told.code, told.err) == (2, f"error: {file}:2: unknown key modration; did you mean moderation?\n")
    told = recipe.run("chain", "--moderation.epochs", "1")
    assert told.code == 2
    assert "command line: unknown flag --moderation.epochs" in told.err


@pytest.mark.parametrize(
    ("command", "flags", "needed"),
    [
        ("ppo", "--vllm_folder=f", "vllm_server"),
        ("ppo", "--vllm_transport=lora", "vllm_server"),
        ("ppo", "--vllm_colocated", "vllm_server"),
        ("ppo", "--vllm_wait_seconds=1", "vllm_server"),
        ("ppo", "--vllm_tolerance_nats=1", "vllm_server"),
        ("chain", "--ppo.vllm_folder=f", "vllm_server"),
        ("evaluate_policy", "--served_as=it", "template"),
        ("evaluate_policy", "--least_probability=0.5", "template"),
        ("judge_card", "--output_dir=d --served_as=it", "template"),
        ("serve_policy", "--model=m --upstream_seconds=9", "upstream"),
        ("serve_policy", "--model=m --retention_days=9", "store"),
        ("serve_policy", "--model=m --scrub=f.py:f", "store"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(command: str, flags: str, needed: str) -> None:
    told = recipe.run(command, *flags.split())
    name = flags.rpartition("--")[2].partition("=")[0].removeprefix("ppo.")
    assert told.code == 2
    assert re.search(
        rf"\b{name}=\S+ does nothing without {needed}; give {needed} too, or leave {name} out\n$", told.err
    )


def test_settings_beside_the_one_that_they_need() -> None:
    PPORecipe(vllm_server="http://h:1", vllm_folder="f", vllm_colocated=True)
    PPORecipe(vllm_wait_seconds=300.0)  # as it is by default
    PPORecipe(kl_target_nats=None, kl_horizon=900, pretraining_data=None, pretraining_rows=8)  # switched off by null


def test_a_chains_card_of_its_reward_model_leaves_out_what_belongs_to_a_template(tmp_path: Path) -> None:
    config = JudgeStageConfig(
        judge="m", template="pairwise", least_probability=0.5, served_as="it", margin=0.1, output_dir="d"
    )
    own, asked = (step.config for step in judge_steps(tmp_path, config))
    assert asked == config
    folder = str(tmp_path / "judge_card_reward_model")
    assert own == JudgeStageConfig(margin=0.1, output_dir=folder)
