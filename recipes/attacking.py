"""Attacks that a model writes, for `red_team`: zero-shot, few-shot, fine-tuned on hits, or trained by PPO. `config` is
a RedTeamConfig of `red_team`, which imports this file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.run import console
from rlhf.run.checkpoint import remove, write_json_atomic
from rlhf.run.stages import drop_checkpoints

if TYPE_CHECKING:
    from rlhf.evals.asking import Asker
    from rlhf.evals.cache import Answers
    from rlhf.safety.attacks import Trial, Tried
    from rlhf.safety.outcome import Result
    from rlhf.safety.policy import Policy
    from rlhf.safety.refusals import Detector
    from rlhf.safety.suite import Case

Method = Literal["zero_shot", "few_shot", "sft", "ppo"]
SET_HERE = ("output_dir", "seed", "bf16", "temperature", "max_new_tokens")
"""Settings of SFT and PPO that `train` may not name."""


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Attacks that a model writes, besides the suites."""

    method: Method = "zero_shot"
    """zero_shot: ask the attacker; few_shot: show it attacks that got through; sft: fine-tune it on these; ppo: train
    it by PPO, score = success x validity + novelty."""
    attacker: str = ""
    """The model that writes attacks: a folder, adapter or hub id; for zero_shot and few_shot also a server's
    address."""
    attacks: int = 200
    """Attacks sampled, and counted; the policy's categories to refuse take turns."""
    instruction: str | None = None
    """What the attacker is asked, with {title}, {text}, {id} and {examples}; null: the one in rlhf.safety.attacks."""
    valid: str | None = None
    """A function (file.py:name) f(attacks, category) that says from 0 to 1 how far each is an attack on its category;
    null: the judge says it."""
    examples: int = 4
    """few_shot: attacks that got through that each request shows."""
    temperature: float = 1.0
    """Of the attacker."""
    max_new_tokens: int = 96
    """Longest attack."""
    similarity: float = 0.5
    """From which similarity on (Jaccard, of character 5-grams) two successes count as one."""
    novelty_coef: float = 0.3
    """ppo: weight of an attack's novelty against the bank of successes; 0: none."""
    answers: int = 1
    """ppo: answers of the policy to each attack in training, whose share of successes is its success; several help
    where successes are rare, and need a temperature above 0. Counted is one answer to each attack."""
    train: dict[str, Any] = field(default_factory=dict)
    """sft, ppo: settings of that training, as `rlhf sft --help` and `rlhf ppo --help` name them."""

    def __post_init__(self) -> None:
        if not self.attacker:
            raise InputError("attacker is missing; name the model that writes attacks (--attack.attacker)")
        for name, least in (("attacks", 1), ("examples", 1), ("max_new_tokens", 1), ("answers", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.similarity <= 1:
            raise InputError(f"similarity={self.similarity} must be above 0 and at most 1 (1: equal only)")
        if not (0 <= self.novelty_coef < math.inf and 0 < self.temperature < math.inf):
            raise InputError(
                f"novelty_coef={self.novelty_coef} must be 0 or more, temperature={self.temperature} above"
            )
        if self.train and self.method not in ("sft", "ppo"):
            raise InputError(f"train is for the methods sft and ppo; leave it out of {self.method}")
        if named := next((name for name in SET_HERE if name in self.train), None):
            raise InputError(f"train: {named} is set for the attacker elsewhere; leave it out")


def asker(config: Any, model: str, answers: Answers) -> Asker:
    """Open a model, with the file that keeps its answers."""
    from rlhf.evals.asking import Asker
    from rlhf.evals.targets import open_target

    rows, tokens = config.generation_batch_size, config.tokens_per_microbatch
    return Asker(open_target(model, config.bf16, rows, tokens, config.requests_at_once), answers, rows)


def trial_of(config: Any, target: Asker, detector: Detector, judge: Asker | None) -> Trial:
    """Return what tries a written attack."""
    from rlhf.evals.asking import Sampler
    from rlhf.safety.attacks import Trial, valid_by, valid_by_judge

    if config.attack.valid is not None:
        valid = valid_by(configs.import_function(config.attack.valid))
    else:
        assert judge is not None  # the settings' own check
        valid = valid_by_judge(judge)
    success = configs.import_function(config.success) if config.success else None
    sampler = Sampler(config.max_new_tokens, config.temperature)
    return Trial(target, detector, valid, success, sampler, config.seed)


def generate(
    config: Any,
    attack: AttackConfig,
    policy: Policy,
    trial: Trial,
    hits: Sequence[Case],
    folder: Path,
    answers: Answers,
    begin: Callable[[], None],
    resuming: bool,
) -> tuple[list[Result], dict[str, Any]]:
    """Write attacks, try them, and count; returns them as results of the suite `generated`, and the numbers.

    hits: attacks of the suites that got through, in which few_shot, sft and ppo begin. folder: for the attacker that
    is trained. begin: called before an attacker is trained, once its settings are found good. resuming: whether what
    lies in the folder is this run's own."""
    from rlhf.evals.asking import Sampler, seed_of
    from rlhf.safety import attacks

    instruction = attack.instruction or attacks.INSTRUCTION
    shown = attack.examples if attack.method == "few_shot" else 0
    hits = [hit for hit in hits if hit.category in policy.categories]
    asked = attacks.wanted(policy, attack.attacks, instruction, hits, shown, config.seed)
    if attack.method in ("few_shot", "sft") and not hits:
        raise InputError(
            f"attack.method={attack.method}: no attack on the policy's categories got through, so there is nothing to "
            "begin with; run zero_shot first, and name its findings.jsonl among --data"
        )
    attacker, found = attack.attacker, {}
    if attack.method == "sft":
        attacker = _fine_tuned(config, attack, policy, instruction, hits, folder, begin, resuming)
    elif attack.method == "ppo":
        attacker, found = _reinforced(config, attack, policy, instruction, trial, hits, folder, begin, resuming)
    writer = asker(config, attacker, answers)
    prompts = [writer.target.prompt(one.prompt) for one in asked]
    seeds = [seed_of(config.seed, one.prompt, number) for number, one in enumerate(asked)]
    written = writer.sample(prompts, seeds, Sampler(attack.max_new_tokens, attack.temperature))
    tried = trial([answer.text.strip() for answer in written], [one.category for one in asked])
    return [one.result(n, f"attack {n}") for n, one in enumerate(tried)], _numbers(attack, tried) | found


def _numbers(attack: AttackConfig, tried: Sequence[Tried]) -> dict[str, Any]:
    """Return how many attacks were valid, succeeded, and were different."""
    from rlhf.evals.measure import as_metric
    from rlhf.intervals import proportion
    from rlhf.safety.diversity import distinct

    hits, n = [one.text for one in tried if one.hit], len(tried)
    valid = sum(one.valid > 0.5 for one in tried)
    different = len(distinct(hits, attack.similarity))
    return {
        "method": attack.method, "attacker": attack.attacker, "attacks": n,
        "success": as_metric(proportion(len(hits), n), n), "valid": as_metric(proportion(valid, n), n),
        "distinct_successes": different, "similarity": attack.similarity,
        "distinct_attacks": len(distinct([one.text for one in tried if one.text], attack.similarity)),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- training the attacker


def _fine_tuned(
    config: Any, attack: AttackConfig, policy: Policy, instruction: str, hits: Sequence[Case], folder: Path,
    begin: Callable[[], None], resuming: bool,
) -> str:  # fmt: skip
    """Fine-tune the attacker on attacks that got through, unless that is done, and return its folder."""
    from rlhf.safety.attacks import asked_for
    from rlhf.sft.config import SFTConfig
    from rlhf.sft.trainer import SFTTrainer

    done = folder / "trained.json"
    if resuming and done.is_file():
        return str(folder)
    rows = [
        {
            "prompt": asked_for(policy.categories[hit.category], instruction),
            "completion": [{"role": "assistant", "content": str(hit.prompt[-1]["content"])}],
        }
        for hit in hits
    ]
    settings = {"output_dir": str(folder), "seed": config.seed, "bf16": config.bf16, **attack.train}
    args = configs.from_dict(SFTConfig, settings, "attack.train")
    begin()  # the trainer makes its folder
    remove(folder)  # what a killed run left of it: minutes at most
    trainer = SFTTrainer(attack.attacker, args, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(folder))
    write_json_atomic(done, {"rows": len(rows)})
    return str(folder)


def _reinforced(
    config: Any,
    attack: AttackConfig,
    policy: Policy,
    instruction: str,
    trial: Trial,
    hits: Sequence[Case],
    folder: Path,
    begin: Callable[[], None],
    resuming: bool,
) -> tuple[str, dict[str, Any]]:
    """Train the attacker by PPO, unless that is done, and return its folder and what it found on the way."""
    from rlhf.ppo.config import PPOConfig
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.safety.attacks import AttackScore, asked_for
    from rlhf.safety.diversity import Bank, distinct

    done = folder / "trained.json"
    bank = Bank(folder / "bank.jsonl", [str(hit.prompt[-1]["content"]) for hit in hits])
    if not resuming:
        bank.rewind(0)  # of a run that this one replaces
    if not (resuming and done.is_file()):
        rows = [
            {"prompt": asked_for(category, instruction), "category": category.id}
            for category in policy.disallowed
            if category.behaviour == "refuse"
        ]
        settings = {
            "output_dir": str(folder), "seed": config.seed, "bf16": config.bf16, "temperature": attack.temperature,
            "max_new_tokens": attack.max_new_tokens, **attack.train,
        }  # fmt: skip
        args = configs.from_dict(PPOConfig, settings, "attack.train")
        trained = copy.copy(trial)
        trained.answers = attack.answers
        score = AttackScore(trained, policy, bank, attack.novelty_coef)
        trainer = PPOTrainer(attack.attacker, score, args=args, train_dataset=rows)
        begin()
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(folder)
        write_json_atomic(done, {"updates": args.updates, "tried": args.updates * args.rollout_size})
        drop_checkpoints(folder)
    new = [text for _, text in bank.steps]
    different = len(distinct(new, attack.similarity))
    console.stage_line("red_team", f"{len(new):,} attacks got through in training, {different:,} of them different")
    return str(folder), {"hits_in_training": len(new), "distinct_hits_in_training": different}
