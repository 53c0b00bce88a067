"""What a stage says when it is done: where it saved, its report, the command that comes next."""

from __future__ import annotations

import gc
import json
import shlex
import weakref
from pathlib import Path

import pytest
from reference import recipe

from rlhf.config import load
from rlhf.errors import InputError
from rlhf.run.changes import changes
from rlhf_recipes.attacking import AttackConfig
from rlhf_recipes.stage import fingerprint_of, inputs_of, next_command, open_stage


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--config", "toy.yaml"], "rlhf ppo --config toy.yaml"),
        (["--config=toy.yaml", "--seed", "3"], "rlhf ppo --config toy.yaml"),
        (["--config", "toy.yaml", "--output_dir", "X/rm"], "rlhf ppo --config toy.yaml --output_dir X/ppo"),
        (["--model", "m", "--output_dir", "X/rm"], "rlhf ppo --output_dir X/ppo --train_data prompts.jsonl"),
    ],
)
def test_the_next_command_shares_the_config_or_names_what_is_missing(tmp_path, capsys, argv, expected) -> None:
    argv = [word.replace("X/", f"{tmp_path}/") for word in argv]
    next_command("ppo", argv, f"{tmp_path}/rm", train_data="rankings/prompts.jsonl")
    assert shown(capsys) == ["next " + expected.replace("X/", f"{tmp_path}/")]


def test_a_config_names_no_command_that_it_does_not_hold(tmp_path, capsys) -> None:
    held = {
        "toy.yaml": ["rankings", "evaluate_policy", "chain"],
        "customer.yaml": [],
        "toy_baselines.yaml": ["evaluate_policy"],
        "sentiment_trl.yaml": ["evaluate_policy"],
        "toy_flywheel.yaml": ["rankings", "evaluate_policy", "chain"],
    }
    for file, expected in held.items():
        for name in ("rankings", "evaluate_policy", "chain"):
            next_command(name, ["--config", file], f"{tmp_path}/x")
        assert shown(capsys) == [f"next rlhf {name} --config {file}" for name in expected]


def test_what_an_earlier_stage_left_needs_no_flag(tmp_path, capsys) -> None:
    (tmp_path / "rankings").mkdir()
    (tmp_path / "rankings/prompts.jsonl").touch()
    next_command("ppo", [], f"{tmp_path}/rm", train_data="rankings/prompts.jsonl")
    next_command("evaluate_policy", [], f"{tmp_path}/ppo", "evaluation", judge="judge")
    assert shown(capsys) == [
        f"next rlhf ppo --output_dir {tmp_path}/ppo",
        f"next rlhf evaluate_policy --output_dir {tmp_path}/evaluation --judge judge",
    ]


@pytest.mark.parametrize("command", ["ppo", "baseline"])
def test_the_runs_own_reward_model_is_left_out_by_name(tmp_path, command) -> None:
    """Where it is served, its score would count twice: once from the server, once from the run's folder."""
    for folder in ("sft", "reward_model", "process_reward", "rankings"):
        (tmp_path / folder).mkdir()
    (tmp_path / "rankings/prompts.jsonl").touch()
    module = recipe.load(command)
    config_of = {"ppo": "PPORecipe", "baseline": "BaselineConfig"}[command]
    method = ["--method", "grpo"] if command == "baseline" else ["--process_model", "none"]

    def taken(*flags: str):
        argv = ["--output_dir", f"{tmp_path}/{command}", *method, *flags]
        config, sources = module.inputs(load(getattr(module, config_of), argv))
        assert sources.get("process_model") is None
        assert sources["reward_model"] == config.reward_model
        return config.reward_model

    served = ("--reward_functions", "[http://127.0.0.1:8000]")
    assert taken() == taken(*served) == f"{tmp_path}/reward_model"
    assert taken(*served, "--reward_model", "none") is None
    with pytest.raises(InputError, match="reward_model=none: it is needed here; name one, or leave it out"):
        taken("--reward_model", "none")


def shown(capsys) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_stage_ends_with_its_folder_and_its_reports(tmp_path, capsys) -> None:
    config = load(recipe.load("sft").SFTRecipe, ["--output_dir", f"{tmp_path}/run/sft"])
    stage = open_stage("sft", config, {})
    stage.begin()
    (stage.folder / "card.html").touch()
    stage.finish({"loss": 2.5})
    done, *rest = shown(capsys)
    assert done.startswith("sft done in ")
    assert rest == [f"saved in {stage.folder}", f"report {stage.folder / 'card.html'}"]


def test_a_function_that_a_nested_setting_names_is_an_input(tmp_path: Path) -> None:
    """red_team's attack.valid, and a list in a mapping."""
    file = tmp_path / "f.py"
    config = recipe.load("red_team").RedTeamConfig(
        policy="toy",
        attack=AttackConfig(attacker="x", method="sft", valid=f"{file}:valid", train={"lists": [f"{file}:other"]}),
    )
    found = []
    for text in ("one", "two"):
        file.write_text(text)
        found.append(inputs_of(config, {})["code"])
    assert {*found[0]} == {*found[1]} == {f"{file}:valid", f"{file}:other"}
    assert all(found[0][name] != found[1][name] for name in found[0])


def test_a_function_of_a_module_is_an_input_too_and_a_run_begun_before_that_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "own_package" / "rewards.py"
    module.parent.mkdir()
    texts = ["own_package.rewards:f", "own_package:f", "no_such.module:f", "json.tool", "rlhf.scores:f", "a text: b"]
    config = AttackConfig(attacker="x", method="sft", train={"lists": texts})
    found = []
    for text in ("one", "two"):
        module.write_text(text)
        found.append(inputs_of(config, {}))
    one, two = (inputs["code"] for inputs in found)
    assert [*one] == [*two] == texts[:1]
    assert one != two
    assert [change.name for change in changes(*found)] == [f"code.{texts[0]}"]
    assert not changes({"config": found[0]["config"]}, found[1])


def test_task_files_of_lm_eval_are_an_input(tmp_path: Path) -> None:
    module, file = recipe.load("run_evals"), tmp_path / "tasks" / "own.yaml"
    file.parent.mkdir()
    found = []
    for name, text in (("tasks", "one"), ("tasks", "two"), ("moved", "two")):
        (tmp_path / "tasks").rename(tmp_path / name)
        (tmp_path / name / "own.yaml").write_text(text)
        asked = module.RunEvalsConfig(model="m", lm_eval=["own"], lm_eval_path=str(tmp_path / name))
        found.append(inputs_of(*module.inputs(asked)))
    assert changes(found[0], found[1])
    assert not changes(found[1], found[2]), "where they lie may change"


@pytest.mark.parametrize("part", ["@train", "@dev", ":sub", ":sub@train"])
def test_a_folder_counts_by_its_content_also_where_its_split_or_part_is_named(tmp_path: Path, part) -> None:
    folder = tmp_path / "d"
    files = [folder / "train.jsonl", folder / "dev.jsonl", folder / "sub" / "train.jsonl"]
    (folder / "sub").mkdir(parents=True)
    for file in files:
        file.write_text('{"prompt": "a"}')
    before = fingerprint_of(f"{folder}{part}")
    assert before == {"part": part, "content": fingerprint_of(folder)}
    folder.rename(tmp_path / "moved")
    assert fingerprint_of([{"path": f"{tmp_path}/moved{part}", "weight": 2}]) == [{"path": before, "weight": 2}]
    (tmp_path / "moved").rename(folder)
    for file in files:
        file.write_text('{"prompt": "b"}')
        assert fingerprint_of(f"{folder}{part}") != before, file
        file.write_text('{"prompt": "a"}')
    (folder / "manifest.json").write_text('{"stage": "rankings", "inputs": {}, "seed": 0}')
    assert set(fingerprint_of(f"{folder}{part}")) == {"manifest", "part", "content"}
    names = [f"{tmp_path}/e{part}", f"{files[0]}:function", "owner/name", "http://host:1", f"owner/name{part}"]
    assert [fingerprint_of(name) for name in names] == names, "what is no folder here counts by its name"


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("run_evals", ["--eval_data", "arithmetic"]),
        ("red_team", ["--policy", "toy"]),
        ("sft", ["--train_data", "FILE"]),
        ("reward_model", ["--train_data", "FILE"]),
        ("process_reward", ["--train_data", "FILE"]),
        ("ppo", ["--train_data", "FILE", "--reward_model", "missing"]),
        ("moderation", ["--train_data", "FILE"]),
    ],
)
def test_whatever_takes_a_policy_takes_a_baselines(tmp_path: Path, command, flags) -> None:
    """The folders hold a manifest and no model: what is refused by its stage is refused before that is missed."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Name a fox.", "chosen": "a fox", "rejected": "no"}\n')
    flags = [word.replace("FILE", f"{tmp_path}/rows.jsonl") for word in flags]
    for made_by, refused in {"dpo": False, "rloo": False, "reward_model": True}.items():
        (tmp_path / "manifest.json").write_text(json.dumps({"stage": made_by, "inputs": {}, "seed": 0}))
        result = recipe.run(command, "--model", tmp_path, "--output_dir", tmp_path / "out" / command, *flags)
        assert result.code == 2
        assert ("made by stage" in result.err) == refused, result.err


@pytest.mark.slow
def test_the_commands_that_stages_name_make_a_run(tmp_path: Path, tiny_model, tiny_tokenizer) -> None:
    """Rankings of people by flags: every next command is typed as it stands, stand-ins replaced."""
    from reference import tiny_chain

    base = tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)
    pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Count {n}.", "chosen": f"{n} of it", "rejected": "no fox"} for n in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(4)))
    smaller = {
        "reward_model": ["--prompts_per_batch", "8"],
        "ppo": ["--updates", "1", "--rollout_size", "4", "--minibatch_size", "4", "--max_new_tokens", "4"],
        "evaluate_policy": ["--max_new_tokens", "4", "--best_of", "0"],
    }
    stand_ins = {"pairs.jsonl": str(pairs), "prompts.jsonl": str(prompts), "eval_prompts.jsonl": str(prompts)}
    stand_ins["judge"] = f"{tmp_path}/run/reward_model"
    command = ["sft", "--model", str(base), "--train_data", str(pairs), "--output_dir", f"{tmp_path}/run/sft"]
    seen = []
    while command:
        name, *flags = command
        result = recipe.run(name, *(stand_ins.get(word, word) for word in flags), *smaller.get(name, ["--epochs", "1"]))
        assert result.code == 0, result.out + result.err
        seen.append(name)
        told = [line for line in result.out.splitlines() if line.startswith("next ")]
        command = shlex.split(told[0])[2:] if told else []
    assert seen == ["sft", "reward_model", "ppo", "evaluate_policy"]


def test_what_a_finished_stage_left_is_freed_before_the_next_begins(tmp_path) -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = {"trainer": self}

    from rlhf_recipes.sft import SFTRecipe

    gc.disable()
    try:
        left = weakref.ref(Trainer())
        assert left() is not None
        open_stage("sft", SFTRecipe(output_dir=str(tmp_path / "sft")), {})
        assert left() is None
    finally:
        gc.enable()
