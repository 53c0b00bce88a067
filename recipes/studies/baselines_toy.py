"""Study 16: PPO beside trl's DPO, KTO, GRPO and RLOO on the same files, each at its best of as many trials.

    python recipes/studies/baselines_toy.py --tune true    # the trials, on a seed that is not reported
    python recipes/studies/baselines_toy.py

PPO, GRPO and RLOO make as many score calls on the same prompts; DPO and KTO learn from the reward model's rankings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.jsonl import read_object
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.stages import Manifest
from rlhf_recipes.baseline import baseline
from rlhf_recipes.baseline_config import METHODS, BaselineConfig
from rlhf_recipes.ppo import PPORecipe, ppo
from rlhf_recipes.stage import SECTIONS
from rlhf_recipes.studies import study
from rlhf_recipes.studies.shared_runs import chain, compared, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at

GOLD, WON, MOVED, TOKENS, COST, CALLS, TRIALS = "gold", "won", "distance", "length", "cost", "calls", "trials"
TUNED = "tuned.json"


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig(StudyConfig):
    """Settings of the study."""

    tune: bool = False
    """Run the trials on tuning_seed, and keep each method's best for the reported seeds."""
    tuning_seed: int = 9
    """Seed of the trials; it is none of the reported ones."""
    learning_rates: dict[str, list[float]] = field(default_factory=dict)
    """Trials of each method: as many for all."""
    baselines: str = "toy_baselines.yaml"
    """Config of the other methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tune and self.tuning_seed in self.seeds:
            raise InputError(f"seeds={self.seeds}: the settings are chosen on seed {self.tuning_seed}; report others")
        if self.learning_rates and len({len(trials) for trials in self.learning_rates.values()}) > 1:
            raise InputError("learning_rates: give every method as many trials")

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, "baselines": self.baselines, "trials": str(Path(self.output_dir).parent / TUNED)}

    def check(self) -> None:
        tuned(self)


def trained(config: BaselinesConfig, method: str, rate: float) -> Path:
    """Train a method at a learning rate, beside the seed's chain; its folder."""
    out = f"{method}_{rate:g}"
    if method == "ppo":
        return stage(config, ppo, PPORecipe, "ppo", out, learning_rate=rate, value_learning_rate=2 * rate, save_steps=0)
    argv = ["--config", config.baselines, "--method", method, "--seed", str(config.seed)]
    argv += ["--output_dir", str(config.shared / out)]
    own = configs.load(BaselineConfig, argv, section="baseline", known_sections=SECTIONS)
    chosen = replace(getattr(own, method), learning_rate=rate, save_steps=0)
    baseline(replace(own, **{method: chosen}))
    return config.shared / out


def judged(config: BaselinesConfig, out: str, folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Compare policies with SFT on the chain's evaluation prompts; an entry per folder's name."""
    first, *others = folders
    entries = read_object(compared(config, out, policy=str(first), policies=[*map(str, others)]) / "evaluation.json")
    return {first.name: entries["ppo"], **{folder.name: entries[folder.name] for folder in others}}


def tune(config: BaselinesConfig) -> Path:
    """Run every method's trials on the tuning seed; write the learning rate with the highest gold score of each."""
    home = Path(config.output_dir) / "baselines_toy"
    own = replace(config, seeds=[config.tuning_seed], output_dir=str(home / f"seed-{config.tuning_seed}"))
    chain(own, "reward_model")
    found: dict[str, dict[str, float]] = {}
    for method, rates in config.learning_rates.items():
        folders = [trained(own, method, rate) for rate in rates]
        entries = judged(own, f"tuning_{method}", folders)
        gold = [entries[folder.name]["gold_score"] for folder in folders]
        found[method] = {f"{rate:g}": value for rate, value in zip(rates, gold, strict=True)}
        console.stage_line("tuned", f"{method}: gold {found[method]}")
    best = {method: float(max(trials, key=trials.__getitem__)) for method, trials in found.items()}
    home.mkdir(parents=True, exist_ok=True)
    write_json_atomic(home / TUNED, {"seed": config.tuning_seed, "trials": found, "best": best})
    return home / TUNED


def tuned(config: BaselinesConfig) -> dict[str, Any]:
    """Read what `tune` wrote. Raises InputError where the trials have not been run."""
    file = Path(config.output_dir).parent / TUNED
    if not file.is_file():
        raise InputError(f"{file}: not there; run the trials first: baselines_toy.py --tune true")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def run(config: BaselinesConfig) -> Iterator[Row]:
    found = tuned(config)
    chain(config, "reward_model")
    folders = {method: trained(config, method, rate) for method, rate in found["best"].items()}
    entries = judged(config, "baselines", list(folders.values()))
    for method, folder in folders.items():
        entry, name, made = entries[folder.name], method.upper(), Manifest.read(folder)
        yield Row(name, entry["gold_score"], None, *entry["gold_score_ci"], entry["prompts"], GOLD)
        yield Row(name, entry["win_rate_vs_sft"], None, *entry["win_rate_ci"], entry["prompts"], WON)
        yield Row(name, entry["kl_nats"], n=entry["prompts"], panel=MOVED)
        yield Row(name, entry["response_tokens"], n=entry["prompts"], panel=TOKENS)
        yield Row(name, made.seconds / 60, panel=COST)
        yield Row(name, ppo_calls(made) if method == "ppo" else made.outputs["score_calls"], panel=CALLS)
        for rate, gold in found["trials"][method].items():  # of the tuning seed: the same for every reported one
            yield Row(name, gold, float(rate), panel=TRIALS)


def ppo_calls(made: Manifest) -> int:
    own = made.inputs["config"]
    return int(own["updates"] * own["rollout_size"])


def above(other: str, rows: Sequence[Row]) -> float:
    return at(rows, "PPO", panel=GOLD) - at(rows, other, panel=GOLD)


STUDY = Study(
    name="baselines_toy",
    number=16,
    title="PPO beside DPO, KTO, GRPO and RLOO",
    claim="PPO with a learned reward and a critic reaches a better policy than methods without the one or the other.",
    source="Xu et al. 2404.10719 (Is DPO superior to PPO?)",
    miniature="The toy world: the same SFT model, rankings, reward model and prompts; each method at the best of three "
    "learning rates on seed 9; PPO, GRPO and RLOO at equal score calls. Minutes are of one thread.",
    panels=[
        Panel(GOLD, y="gold score"),
        Panel(WON, y="preferred to SFT by gold"),
        Panel(MOVED, y="KL to SFT, nats"),
        Panel(TOKENS, y="tokens per response"),
        Panel(COST, y="minutes of training"),
        Panel(CALLS, y="score calls"),
        Panel(TRIALS, "learning rate", "gold score on the tuning seed", "log"),
    ],
    checks=[
        Check(f"PPO above {other.upper()} in gold", partial(above, other.upper()))
        for other in ("dpo", "kto", "grpo", "rloo")
    ],
    run=run,
)


def main(argv: list[str]) -> None:
    """Run the trials, or the study."""
    own = ["--config", f"{__file__[:-3]}.yaml", *argv] if "--config" not in argv else argv
    config = configs.load(BaselinesConfig, own, description=f"{STUDY.title}: {STUDY.claim}")
    if unknown := set(config.learning_rates) - {"ppo", *METHODS}:
        raise InputError(f"learning_rates: {sorted(unknown)[0]!r} is none of ppo, {', '.join(METHODS)}")
    if config.tune:
        console.stage_line("tuned", str(tune(config)))
    else:
        study.main(STUDY, BaselinesConfig, __file__, argv)


if __name__ == "__main__":
    configs.run(main)
