"""recipes/reward_model.py with several seeds, sizes, a chosen checkpoint and demonstrations to normalise on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import recipe, tiny_chain

from reward_models import RewardModel
from rlhf.run.stages import Manifest


@pytest.fixture
def base(tmp_path: Path, tiny_model, tiny_tokenizer) -> Path:
    tiny_chain.shake(tiny_model, 0, 0.05)
    return tiny_chain.save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer)


def run(*flags: object, code: int = 0) -> recipe.Result:
    result = recipe.run("reward_model", *flags)
    assert result.code == code, result.out + result.err
    return result


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Two rows per prompt; a third of the labels is the wrong way round."""
    rng, rows = np.random.default_rng(first), []
    for n in range(first, first + count):
        for _ in range(2):
            texts = [f"the fox {rng.integers(9)}", f"a dog {rng.integers(9)}"]
            texts = texts[:: 1 if rng.random() < 0.67 else -1]
            rows.append({"prompt": f"Name {n}.", "chosen": texts[0], "rejected": texts[1]})
    return rows


def flags(tmp_path: Path, base: Path, *more: object) -> list[object]:
    train = write(tmp_path / "train.jsonl", pairs(20))
    held_out = write(tmp_path / "held_out.jsonl", pairs(15, first=50))
    return ["--model", base, "--train_data", train, "--eval_data", held_out, "--output_dir", tmp_path / "my" / "rm",
            "--prompts_per_batch", 4, "--microbatch_size", 4, "--learning_rate", "3e-3", "--save_steps", 3,
            "--normalizer_samples", 16, "--preflight", "false", *more]  # fmt: skip


@pytest.mark.slow
def test_the_best_of_several_seeds_is_saved_and_the_spread_told(tmp_path: Path, base: Path) -> None:
    given = flags(tmp_path, base, "--seeds", "[3,4,5]")
    out = tmp_path / "my" / "rm"
    run(*given)
    outputs = Manifest.read(out).outputs
    losses = {seed: told["eval_loss"] for seed, told in outputs["seeds"].items()}
    assert sorted(losses) == ["3", "4", "5"]
    assert len(set(losses.values())) == 3
    assert str(outputs["seed"]) == min(losses, key=losses.get)
    assert outputs["eval_loss"] == min(losses.values())
    spread, values = outputs["seeds_spread"], np.array(list(losses.values()))
    assert spread["eval_loss_mean"] == pytest.approx(values.mean())
    assert spread["eval_loss_std"] == pytest.approx(values.std())
    assert spread["eval_loss_range"] == [values.min(), values.max()]
    assert outputs["accuracy"] == outputs["seeds"][str(outputs["seed"])]["accuracy"]
    assert outputs["training_prompts"] == 36  # a tenth of the 20 prompts is chosen by, never trained on
    assert not [path.name for path in out.iterdir() if path.name.startswith(("seed-", "checkpoint-", "best"))]
    # the saved one is what that seed alone trains
    alone = [*given[: given.index("--seeds")], "--seed", outputs["seed"]]
    selection = tmp_path / "selection.jsonl"
    write_split(tmp_path, selection)
    alone[alone.index("--train_data") + 1] = tmp_path / "rest.jsonl"
    alone[alone.index("--output_dir") + 1] = tmp_path / "my" / "alone"
    run(*alone)
    said = [RewardModel.load(folder)(["Name 9."] * 2, ["the fox", "a dog"]) for folder in (out, tmp_path / "my/alone")]
    assert said[0] == said[1]


def test_all_seeds_are_chosen_by_the_same_prompts(tmp_path: Path, base: Path) -> None:
    """max_eval_prompts draws once, with the run's seed: else a seed could win by easier prompts."""
    module = recipe.load("reward_model")
    train, chosen_by = (write(tmp_path / f"{first}.jsonl", pairs(10, first)) for first in (0, 50))
    more = {"eval_data": str(write(tmp_path / "held.jsonl", pairs(3, 90))), "selection_data": str(chosen_by)}
    config = module.RewardRecipe(
        model=str(base), train_data=str(train), **more, seeds=[3, 4], max_eval_prompts=6, output_dir=str(tmp_path / "a")
    )
    data = module.read_data(config)
    drawn = [module.build(replace(config, seed=seed), data.train, data).eval_dataset["chosen_ids"] for seed in (3, 4)]
    assert len(drawn[0]) == 6
    assert list(drawn[0]) == list(drawn[1])
    single = module.RewardRecipe(**{**vars(config), "seeds": None, "keep_best": True, "eval_steps": 2, "seed": 4})
    again = module.build(single, data.train, module.read_data(single)).eval_dataset["chosen_ids"]
    assert sorted(again) != sorted(drawn[1])  # another seed's draw


def write_split(tmp_path: Path, selection: Path) -> None:
    """The recipe's own split of train.jsonl, once more."""
    from rlhf.rows.records import read_rankings, split_by_prompt, write_jsonl

    rest, chosen_by = split_by_prompt(read_rankings(tmp_path / "train.jsonl"), 0.1, 1)
    for file, rows in ((tmp_path / "rest.jsonl", rest), (selection, chosen_by)):
        write_jsonl(file, [{"prompt": r.prompt, "responses": r.responses, "ranks": r.ranks} for r in rows])


@pytest.mark.slow
@pytest.mark.long
def test_seeds_go_on_where_they_stopped(tmp_path: Path, base: Path, monkeypatch) -> None:
    given = flags(tmp_path, base, "--seeds", "[3,4]")
    out = tmp_path / "my" / "rm"
    run(*given)
    whole = Manifest.read(out).outputs
    shutil.rmtree(out)
    module = recipe.load("reward_model")
    trained, calls = module.trained, []

    def once(config, *rest):
        calls.append(config.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(config, *rest)

    monkeypatch.setattr(module, "trained", once)
    run(*given, code=130)
    run(*given)
    assert calls == [3, 4, 4]
    assert Manifest.read(out).outputs == whole


@pytest.mark.slow
def test_sizes_are_nested_and_measured_on_the_same_held_out_pairs(tmp_path: Path, base: Path) -> None:
    run(*flags(tmp_path, base, "--sizes", "[12,4]"))
    out = tmp_path / "my" / "rm"
    points = json.loads((out / "sizes.json").read_text())
    assert [point["prompts"] for point in points] == [4, 12, 20]
    assert [point["rankings"] for point in points] == [8, 24, 40]
    assert len({point["n"] for point in points}) == 1
    assert all(point["accuracy_ci"][0] <= point["accuracy"] <= point["accuracy_ci"][1] for point in points)
    outputs = Manifest.read(out).outputs
    assert outputs["sizes"] == points
    assert points[-1]["accuracy"] == outputs["accuracy"]
    assert not list(out.glob("size-*"))


@pytest.mark.slow
def test_keep_best_sets_prompts_aside_and_leaves_no_second_copy(tmp_path: Path, base: Path) -> None:
    shown = write(tmp_path / "shown.jsonl", [{"prompt": "Say", "completion": f"the fox {n}"} for n in range(6)])
    more = ("--keep_best", "true", "--eval_steps", 2, "--normalizer_data", shown, "--lr_schedule", "constant")
    run(*flags(tmp_path, base, *more))
    out = tmp_path / "my" / "rm"
    outputs = Manifest.read(out).outputs
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    assert outputs["best_eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    assert losses[outputs["best_step"]] == pytest.approx(outputs["best_eval_loss"], abs=1e-6)
    assert outputs["training_prompts"] == 36
    assert not list(out.glob("*best*"))
    scores = torch.tensor(RewardModel.load(out)(["Say"] * 6, [f"the fox {n}" for n in range(6)]))
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--sizes", "[4,20]"), "sizes: 20 is not below the 20 training prompts"),
        (("--sizes", "[0]"), "sizes=[0]: write different whole numbers"),
        (("--seeds", "[1,1]"), "seeds=[1, 1]: write different whole numbers"),
        (("--seeds", "[]"), "seeds=[]: write different whole numbers"),
        (("--keep_best", "true"), "keep_best needs held-out losses to choose by: set eval_steps"),
    ],
)
def test_wrong_settings_leave_nothing_behind(tmp_path: Path, base: Path, more: tuple, says: str) -> None:
    result = run(*flags(tmp_path, base, *more), code=2)
    assert says in " ".join((result.out + result.err).split())
    assert not (tmp_path / "my" / "rm").exists()
