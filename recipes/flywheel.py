"""Rounds of labelling, a reward model, PPO and a gate.

    rlhf flywheel --config toy_flywheel.yaml
    rlhf flywheel --config my.yaml --flywheel.labels people

It begins as the chain does, up to supervised fine-tuning. A round then samples responses of the best policy so far,
has items of them labelled, trains a reward model on the labels of all rounds and a policy against it, and lets the
policy pass if it beats the best one so far. With people it waits while they label at `rlhf label --store FILE`. What
users of a playground compared joins the labels (flywheel.feedback). Run again, it goes on where it stopped. Leaves
flywheel.json and a page in --output_dir, and the labels in labels.db.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.hints import sections_of
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import Prompt, prompt_key, read_prompts, write_jsonl
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.stages import Manifest
from rlhf_recipes.chain import ChainConfig, check, judge_config, steps_of
from rlhf_recipes.evaluate_policy import evaluation
from rlhf_recipes.ppo import ppo
from rlhf_recipes.rankings import rankings
from rlhf_recipes.reward_model import reward_model
from rlhf_recipes.round_labels import StepConfig, label_items, playground_rows
from rlhf_recipes.stage import SECTIONS, open_stage, with_columns

console.quiet()

Labels = Literal["simulated", "grader", "people"]


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What a round does beside the chain's stages."""

    rounds: int = 3
    """Rounds in all; with a higher number the same command goes on."""
    items: int = 500
    """Items labelled in each round: a prompt with data.responses_per_prompt responses."""
    choose: Literal["random", "closeness", "disagreement", "diversity"] = "random"
    """Which items: closeness: where the last reward model is least sure; disagreement: where the last two differ most;
    diversity: prompts far apart. Until there are so many reward models, items are drawn at random."""
    pool: int = 4
    """Items sampled for each that is chosen; with choose: random, one."""
    labels: Labels = "simulated"
    """Who labels: data.labeler; a grader model by a rubric; or people, at `rlhf label`."""
    overlap: int = 1
    """Annotators that judge each item."""
    enough: float = 1.0
    """Share of a round's items that must be judged before it goes on; below 1 for items that nobody can judge."""
    grader: str | None = None
    """labels: grader: causal language model that grades responses, a folder or hub id."""
    rubric: str | None = None
    """labels: grader: its multiple-choice question, a YAML file."""
    store: str | None = None
    """The file of items and judgments; null: labels.db in output_dir."""
    wait_seconds: float = 5.0
    """labels: people: seconds between two looks at the store."""
    feedback: str | None = None
    """The store of a playground (`rlhf serve_policy --store`), whose comparisons the reward models also learn from:
    those that were agreed to, scrubbed and have not expired; null: none."""
    feedback_share: float = 0.1
    """Largest share of one user among the comparisons that a reward model learns from; of a user who gave more, so
    many are drawn."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("items", 2), ("pool", 1), ("overlap", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.enough <= 1:
            raise InputError(f"enough={self.enough} must be a share above 0, up to 1")
        if not 0 < self.feedback_share <= 1:
            raise InputError(f"feedback_share={self.feedback_share} must be a share above 0, up to 1")
        if not self.wait_seconds > 0:
            raise InputError(f"wait_seconds={self.wait_seconds} must be above 0")
        if self.labels == "grader" and self.overlap > 1:
            raise InputError(f"overlap={self.overlap}: a grader says the same each time; leave it at 1")
        if (self.labels == "grader") != (self.grader is not None and self.rubric is not None):
            raise InputError("labels: grader goes together with flywheel.grader and flywheel.rubric; give all or none")

    @property
    def sampled(self) -> int:
        """Items that a round samples."""
        return self.items * (1 if self.choose == "random" else self.pool)


@dataclass(frozen=True, kw_only=True)
class FlywheelConfig(ChainConfig):
    """The chain's settings, for every round alike, and the rounds'."""

    MOST_USED = (
        "output_dir", "seed", "flywheel.rounds", "flywheel.items", "flywheel.labels", "flywheel.choose", "data.labeler",
        "sft.model", "ppo.updates", "evaluation.judge",
    )  # fmt: skip

    output_dir: str = "runs/flywheel"
    """The run's folder; each round has one in it."""
    flywheel: RoundsConfig = field(default_factory=RoundsConfig)


@dataclass(frozen=True)
class Round:
    """A round's outcome."""

    number: int
    folder: Path
    labels: int
    """Of all rounds so far."""
    feedback: int
    """The playground's comparisons that the reward model learned from beside them."""
    accuracy: float
    """The reward model's, on held-out labels."""
    accuracy_ci: list[float]
    entry: dict[str, Any]
    """The new policy in the evaluation against the best one before."""
    passed: bool
    reason: str
    seconds: float

    def row(self) -> dict[str, Any]:
        """Write the round into flywheel.json."""
        measured = {name: value for name, value in self.entry.items() if name != "families"}
        return {**vars(self), "folder": self.folder.name, "entry": measured}


def flywheel(config: FlywheelConfig) -> dict[str, Any]:
    """Run every round that is not complete; the content of flywheel.json."""
    run, turn = Path(config.output_dir), config.flywheel
    require_possible(config)
    check(config)
    for step in steps_of(config):
        if step.name == "rankings":
            break
        step.run(step.config)
    start = config.ppo.model or str(run / "sft")
    prompts = by_main(lambda: drawn_prompts(config))
    best, done = start, list[Round]()
    for number in range(1, turn.rounds + 1):
        own = prompts[(number - 1) * turn.sampled : number * turn.sampled]
        done.append(one_round(config, number, own, best, start, [past.folder / "reward_model" for past in done]))
        said = "passes" if done[-1].passed else "does not pass"
        console.stage_line(f"round {number}", f"{said}: {done[-1].reason}")
        best = str(done[-1].folder / "ppo") if done[-1].passed else best
    return by_main(lambda: write_results(run, done, best))


def require_possible(config: FlywheelConfig) -> None:
    """Raise InputError for settings that would stop the flywheel at its first labels."""
    if config.flywheel.feedback is not None:
        from rlhf.collection.store import Store

        Store(config.flywheel.feedback, create=False).close()
    for name, (_, _, optional) in sections_of(ChainConfig).items():
        if optional and name != "base" and getattr(config, name) is not None:
            raise InputError(f"{name}: no round has this stage; leave the section out and run `rlhf {name}` afterwards")
    if config.overwrite_from is not None:
        raise InputError("overwrite_from: rounds build on all before; pass --overwrite, or name another --output_dir")
    if config.data.rankings is not None:
        raise InputError("data.rankings: the flywheel collects its own; train on given rankings by `rlhf chain`")
    if config.flywheel.labels == "simulated" and config.data.labeler is None:
        raise InputError("data.labeler is missing: name a function that ranks, or set flywheel.labels: people")


def prompts_file(config: FlywheelConfig) -> str:
    """Return the file of all prompts."""
    return config.data.prompts or str(Path(config.output_dir) / "data" / "prompts.jsonl")


def drawn_prompts(config: FlywheelConfig) -> list[Prompt]:
    """Read the prompts in an order drawn with the seed: each round's come after the last one's."""
    turn, source = config.flywheel, prompts_file(config)
    prompts = read_prompts(source, on_bad_row=config.data.on_bad_row)
    if len(prompts) < turn.rounds * turn.sampled:
        needed = f"{turn.rounds} rounds of {turn.sampled:,} need {turn.rounds * turn.sampled:,}"
        raise InputError(f"{source}: {len(prompts):,} prompts, and {needed}; lower flywheel.items, pool or rounds")
    random.Random(config.seed).shuffle(prompts)
    return prompts


def one_round(
    config: FlywheelConfig, number: int, prompts: Sequence[Prompt], best: str, start: str, models: Sequence[Path]
) -> Round:
    """Items, labels, reward model, policy, and the gate."""
    folder = Path(config.output_dir) / f"round_{number}"
    by_main(lambda: sample_items(config, number, folder / "items", prompts, best, models))
    labels = by_main(lambda: label_items(config, number, folder))
    rankings(
        replace(
            config.data, output_dir=str(folder / "data"), make=None, options={}, labeler=None,
            prompts=prompts_file(config), rankings=str(folder / "labels" / "rankings.jsonl"), comparisons=None,
            overwrite=config.overwrite,
        ),
        folder / "rankings",
    )  # fmt: skip
    own = {
        name: replace(getattr(config, name), output_dir=str(folder / name), overwrite=config.overwrite)
        for name in ("reward_model", "ppo", "evaluation")
    }
    # What a stage's settings do not name, it finds in the round's folder, as in a chain's.
    own["reward_model"] = replace(own["reward_model"], model=config.reward_model.model or start)
    said = by_main(lambda: playground_rows(config, number, folder))
    if said:
        both = [str(folder / "rankings" / "train.jsonl"), str(said)]
        named = with_columns(own["reward_model"], "eval_data", "selection_data", "normalizer_data")
        own["reward_model"] = replace(named, columns=None, train_data=both)
    trained = reward_model(own["reward_model"])
    if config.evaluation.judge is None:
        reward_model(judge_config(replace(config, output_dir=str(folder), reward_model=own["reward_model"])), "judge")
    ppo(replace(own["ppo"], model=start))
    held_out = Path(config.output_dir) / "data" / "eval_prompts.jsonl"
    asked = config.evaluation.eval_data or (str(held_out) if held_out.exists() else None)
    outcome = evaluation(replace(own["evaluation"], baseline=best, eval_data=asked))
    from rlhf.collection.rounds import gate

    entry = outcome["evaluation"]["ppo"]
    verdict = gate(entry)
    card = trained | outcome["reward_model"]
    seconds = sum(Manifest.read(path.parent).seconds for path in folder.glob("*/manifest.json"))
    feedback = sum(1 for _ in read_rows(said)) if said else 0
    return Round(
        number, folder, labels, feedback, card["accuracy"], list(card["accuracy_ci"]), entry, verdict.passed,
        verdict.reason, round(seconds, 1),
    )  # fmt: skip


def sample_items(
    config: FlywheelConfig, number: int, folder: Path, prompts: Sequence[Prompt], policy: str, models: Sequence[Path]
) -> None:
    """Sample a round's items from the best policy so far and choose those to be labelled: items.jsonl."""
    from reward_models import RewardModel
    from rlhf.collection.rounds import MODELS_NEEDED, chosen, item_row
    from rlhf.collection.sample import Sampling
    from rlhf.collection.sample import sample_items as sampled

    turn, data = config.flywheel, config.data
    settings = {
        "items": turn.items, "choose": turn.choose, "prompts": [prompt_key(prompt.messages) for prompt in prompts],
        "responses_per_prompt": data.responses_per_prompt, "max_new_tokens": data.max_new_tokens, "bf16": data.bf16,
    }  # fmt: skip
    step = StepConfig(output_dir=str(folder), seed=config.seed + number, settings=settings, overwrite=config.overwrite)
    asked = models[-MODELS_NEEDED[turn.choose] :] if MODELS_NEEDED[turn.choose] else []
    stage = open_stage("items", step, {"policy": policy, **{f"model_{n}": str(m) for n, m in enumerate(asked)}})
    if stage.complete:
        return
    stage.begin()
    sampling = Sampling(
        candidates_per_prompt=data.responses_per_prompt, max_new_tokens=data.max_new_tokens, seed=step.seed,
        batch_size=data.generation_batch_size, bf16=data.bf16,
    )  # fmt: skip
    items = sampled(prompts, [policy], sampling, f"round {number}")
    picked = chosen(items, turn.items, turn.choose, [RewardModel.load(path) for path in asked], step.seed)
    write_jsonl(folder / "items.jsonl", map(item_row, picked))
    stage.finish({"items": len(picked), "sampled": len(items)})


def write_results(run: Path, rounds: Sequence[Round], best: str) -> dict[str, Any]:
    """Write flywheel.json and its page."""
    from rlhf.collection.rounds_page import page
    from rlhf.run import page as html

    rows = [done.row() for done in rounds]
    metrics: dict[str, Any] = {}
    for done in rounds:
        entry, name = done.entry, f"round_{done.number}"
        kind = "gold_score" if entry.get("gold_score") is not None else "judge_score"
        given = {
            kind: (entry[kind], entry[f"{kind}_ci"], entry["prompts"]),
            "win_rate_vs_last": (entry["win_rate_vs_sft"], entry["win_rate_ci"], entry["prompts"]),
            "reward_model_accuracy": (done.accuracy, done.accuracy_ci, None),
        }
        for what, (value, (low, high), n) in given.items():
            metrics[f"{name}/{what}"] = {"value": value, "low": low, "high": high, "n": n}
        if done.feedback:
            metrics[f"{name}/feedback"] = {"value": done.feedback, "low": None, "high": None, "n": done.feedback}
        metrics[f"{name}/labels"] = {"value": done.labels, "low": None, "high": None, "n": done.labels}
    result = {"metrics": metrics, "rounds": rows, "best": best}
    write_json_atomic(run / "flywheel.json", result)
    console.stage_line("flywheel", f"best policy: {best}")
    console.stage_line("report", str(html.write(run / "flywheel.html", page(rows, best))))
    return result


def main(argv: list[str]) -> None:
    flywheel(configs.load(FlywheelConfig, argv, known_sections=SECTIONS, description=__doc__ or ""))


if __name__ == "__main__":
    configs.run(main)
