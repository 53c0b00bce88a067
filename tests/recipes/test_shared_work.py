"""What recipes of one working process share out: two processes leave the files of one, and end together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import forked
from reference.tiny_chain import save_adapter, save_base, save_reward_model, shake
from reference.two_processes import PROMPTS, RANKINGS

from reward_models.ensemble import RewardEnsemble

pytestmark = pytest.mark.slow

FUNCTIONS = """
import os, pathlib

def _asked():
    with pathlib.Path(__file__).with_name("asked").open("a") as file:
        file.write(os.environ.get("RANK", "0"))

def judge(prompts, completions, **columns):
    _asked()
    return [float(str(completion).count("e")) for completion in completions]

def label(prompts, responses, seed, **columns):
    _asked()
    return [[sorted(texts).index(text) for text in texts] for texts in responses]
"""
WATCHED = """
import os, pathlib, runpy, sys
import reward_models.scoring, rlhf.policies, rlhf_recipes.sampled
from rlhf.errors import InputError
planted = sys.argv.pop(1)
def watch(module, name):
    work = getattr(module, name)
    def watched(*given):
        with pathlib.Path(os.environ["WORKED"]).open("a") as file:
            file.write(f"{name}{os.environ['RANK']} ")
        if planted == name and os.environ["RANK"] == "1":
            raise InputError("planted: told by process 1")
        return work(*given)
    watched.__module__, watched.__qualname__ = module.__name__, name
    setattr(module, name, watched)
watch(reward_models.scoring, "_score")
watch(rlhf.policies, "_respond")
watch(rlhf_recipes.sampled, "_apart")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class World:
    """The folders that the recipes read, and what they left, by the number of processes."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any) -> None:
        self.folder = folder
        shake(model, 0, 0.05)
        self.base = save_base(folder, model, tokenizer)
        self.policy = save_adapter(folder, self.base, tokenizer)
        self.other = save_adapter(folder / "4", self.base, tokenizer, seed=4).rename(folder / "other")
        self.scorer = save_reward_model(folder, self.base, tokenizer)
        members = [save_reward_model(folder / str(seed), self.policy, tokenizer, seed) for seed in (5, 6)]
        (folder / "ensemble").mkdir()
        RewardEnsemble.load(members).save(folder / "ensemble")
        (folder / "functions.py").write_text(FUNCTIONS)
        asked = [{"prompt": row["prompt"], "ideal": ["e"]} for row in PROMPTS]
        for name, rows in {"prompts": PROMPTS, "held_out": RANKINGS, "asked": asked}.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(self, recipe: str, run: Path) -> list[str]:
        functions, prompts, held_out = (self.folder / f for f in ("functions.py", "prompts.jsonl", "held_out.jsonl"))
        tokens, batch = "--tokens_per_microbatch 64", "--generation_batch_size 5 --max_new_tokens 7"
        if recipe == "rankings":
            run.mkdir(parents=True, exist_ok=True)
            (run / "sft").symlink_to(self.policy)
        flags = {
            "evaluate_policy": f"--policy {self.policy} --baseline {self.base} --policies {self.other} "
            f"--judge {functions}:judge --reward_model {self.scorer} --eval_data {prompts} --rankings {held_out} "
            f"--best_of 3 {tokens} {batch}",
            "best_of_n": f"--model {self.policy} --data {prompts} --n 3 --scorers {self.scorer} "
            f"--judge {functions}:judge {tokens} {batch}",
            "rankings": f"--labeler {functions}:label --prompts {prompts} --responses_per_prompt 3 {batch}",
            "evaluate_reward_model": f"--reward_model {self.folder}/ensemble --data {held_out} --second_model "
            f"{self.scorer} --sensitivity_pairs 8 {tokens}",
            "run_evals": f"--model {self.policy} --eval_data {self.folder}/asked.jsonl --eval_class Includes "
            f"--temperature 1 --samples_per_item 2 {batch}",
        }[recipe]
        return [f"recipes/{recipe}.py", "--output_dir", str(run / recipe), "--bf16", "false", *flags.split()]

    def run(self, recipe: str, processes: int, planted: str = "nothing") -> tuple[Any, Path, str]:
        """The ended command, its folder, and who worked on what."""
        name = f"{recipe}-{processes}-{planted}"
        run, worked = self.folder / name, self.folder / f"{name}.worked"
        for file in (self.folder / "asked", worked):
            file.write_text("")
        command = ["-c", WATCHED, planted, *self.command(recipe, run)]
        done = forked.shared().together(command, processes, env={"WORKED": str(worked)})
        return done, run / recipe, worked.read_text()


WORLDS: list[World] = []  # of this session


@pytest.fixture
def world(tmp_path_factory: Any, tiny_model: Any, tiny_tokenizer: Any) -> World:
    if not WORLDS:
        WORLDS.append(World(tmp_path_factory.mktemp("shared"), tiny_model, tiny_tokenizer))
    return WORLDS[0]


def left(folder: Path) -> dict[str, str]:
    """The results in a folder, without what names it and its time."""
    found = {}
    for file in sorted(folder.glob("*.json*")):
        text = file.read_text()
        if file.suffix == ".json":
            text = json.dumps(
                {name: value for name, value in json.loads(text).items() if name not in ("about", "made")}
            )
        if file.name not in ("manifest.json", "inputs.json"):
            found[file.name] = text
    return found


@pytest.mark.parametrize(
    ("recipe", "works"),
    [
        ("evaluate_policy", {"_score", "_respond", "_apart"}),
        ("best_of_n", {"_score", "_respond"}),
        ("rankings", {"_respond"}),
        ("evaluate_reward_model", {"_score"}),
        ("run_evals", {"_respond"}),
    ],
)
def test_two_processes_leave_the_files_of_one(world: World, recipe: str, works: set[str]) -> None:
    one, alone, _ = world.run(recipe, 1)
    assert one.returncode == 0, one.stderr[-3000:]
    two, together, worked = world.run(recipe, 2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert {f"{work}{place}" for work in works for place in (0, 1)} == set(worked.split()), "both did each work"
    assert set((world.folder / "asked").read_text()) <= {"0"}, "the first process alone asks judges"
    assert left(alone)
    assert left(together) == left(alone)


@pytest.mark.parametrize("planted", ["_respond", "_apart", "_score"])
def test_a_failure_of_the_second_process_ends_both(world: World, planted: str) -> None:
    done, folder, _ = world.run("evaluate_policy", 2, planted)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: planted: told by process 1"]
    assert not (folder / "manifest.json").exists()
