"""Several reward models as one.

    rlhf reward_model --model runs/my/sft --train_data pairs.jsonl \\
        --seeds '[0,1,2]' --keep_seeds true \\
        --output_dir runs/my/reward_model
    rlhf ensemble --data pairs.jsonl --rule mean_minus_std \\
        --members runs/my/reward_model/seed-0,runs/my/reward_model/seed-1 \\
        --output_dir runs/my/ensemble

An ensemble, or one model of averaged weights. The members are folders of full models or adapters. Their normalisers
are measured on the same responses (--data), so that their scores have one unit. `rlhf ppo --reward_model
runs/my/ensemble` trains against it. With `--rule average` the folder is an ordinary reward model whose weights are the
members' mean (WARM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.records import HELD_OUT, Ranking, read_rankings
from rlhf.run import console
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.owner import by_main
from rlhf.run.precision import compute_dtype
from rlhf_recipes.stage import SECTIONS, check_model, open_stage

if TYPE_CHECKING:
    from reward_models import RewardModel
    from reward_models.ensemble import RewardEnsemble

console.quiet()


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """Several reward models as one."""

    members: list[str]
    """Folders of the reward models: full models, or adapters (those over one base share its memory)."""
    data: str
    """Rankings or demonstrations: on their responses (2048 at most) every member gets mean score 0 and spread 1."""
    rule: Literal["mean", "min", "mean_minus_std", "average"] = "mean"
    """How the members' scores become one: their mean, minimum, or mean less k standard deviations; average: one model
    of their averaged weights."""
    k: float = 1.0
    """Standard deviations that mean_minus_std subtracts."""
    eval_data: str | None = None
    """Held-out rankings, for a report card with the members' accuracies and what their spread says."""
    output_dir: str = "runs/ensemble"
    """The ensemble's folder; it refers to the members' folders, which stay where they are."""
    seed: int = 0
    """Decides bootstraps."""
    tokens_per_microbatch: int = 16384
    """Memory only."""
    bf16: bool | None = None
    """Score in bfloat16; null: where the hardware is fast at it."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        if len(set(self.members)) < 2 or len(set(self.members)) < len(self.members):
            raise InputError(f"members={self.members}: name two different folders or more")
        if not 0 <= self.k < float("inf"):
            raise InputError(f"k={self.k} must be 0 or more")


def ensemble(config: EnsembleConfig) -> dict[str, Any]:
    """The stage: load, align, measure, save. Of several processes the first works, and shares out the scoring."""
    return by_main(lambda: make(config))


def make(config: EnsembleConfig) -> dict[str, Any]:
    for member in config.members:
        check_model(member, ("reward_model", "judge"))
    sources = {"data": config.data, "eval_data": config.eval_data, "members": None}
    sources |= {f"member_{number}": member for number, member in enumerate(config.members)}
    averaged = config.rule == "average"
    stage = open_stage("reward_model" if averaged else "ensemble", config, sources)
    if stage.complete:
        return stage.outputs
    held_out = read_rankings(config.eval_data, HELD_OUT) if config.eval_data else []
    from reward_models.averaging import CONFIGS, average_folders
    from reward_models.ensemble import RewardEnsemble, conversations_of

    scorer: RewardModel | RewardEnsemble
    if averaged:
        stage.begin()
        for name in CONFIGS:  # of a run that was killed: the average is made anew
            (stage.folder / name).unlink(missing_ok=True)
        scorer = average_folders(config.members, stage.folder, config.data)
    else:
        dtype, tokens = compute_dtype(config.bf16), config.tokens_per_microbatch
        rule: Any = config.rule
        scorer = RewardEnsemble.load(
            config.members, rule, config.k, responses=config.data, dtype=dtype, tokens_per_microbatch=tokens
        )
        stage.begin()
        scorer.save(stage.folder)
    metrics = measure(scorer, conversations_of(config.data), held_out, config)
    write_json_atomic(stage.folder / "ensemble.json", {"metrics": metrics, "rule": config.rule, "k": config.k})
    write_page(stage.folder, scorer, metrics, config)
    outputs = {"members": len(config.members), **{name: metric["value"] for name, metric in metrics.items()}}
    return stage.finish(outputs)


def measure(
    scorer: RewardModel | RewardEnsemble, responses: Sequence[Any], held_out: list[Ranking], config: EnsembleConfig
) -> dict[str, dict[str, float]]:
    """The members' spread on the responses, and on held-out rankings the accuracy; the report card beside it."""
    import numpy as np

    from reward_models.card.report import reward_report, save_reward_report
    from reward_models.ensemble import RewardEnsemble
    from rlhf.intervals import bootstrap_interval
    from rlhf.rows.records import prompt_key

    metrics: dict[str, dict[str, float]] = {}
    if isinstance(scorer, RewardEnsemble):
        by_prompt: dict[str, list[float]] = {}
        for talk, spread in zip(responses, scorer.spread(responses), strict=True):
            by_prompt.setdefault(prompt_key(talk[:-1]), []).append(spread)
        means = np.array([float(np.mean(spreads)) for spreads in by_prompt.values()])
        std = bootstrap_interval(means, config.seed, bounds=None)
        metrics["ensemble_std"] = {"value": std.value, "low": std.low, "high": std.high, "n": len(by_prompt)}
    if held_out:
        report = reward_report(scorer, held_out, seed=config.seed, sensitivity_pairs=0)
        about = {"reward_model": Path(config.output_dir).name, "data": str(config.eval_data)}
        save_reward_report(report, config.output_dir, about)
        members = (report["ensemble"] or {"members": []})["members"]
        for name, row in (("accuracy", report), *((f"accuracy_{row['name']}", row) for row in members)):
            low, high = row["accuracy_ci"]
            metrics[name] = {"value": row["accuracy"], "low": low, "high": high, "n": row["n"]}
    return metrics


def write_page(folder: Path, scorer: Any, metrics: dict[str, Any], config: EnsembleConfig) -> None:
    from rlhf.run import page as html
    from rlhf.run.tables import number

    rows = [
        [str(member.folder), f"{member.normalizer.mean:.3f}", f"{member.normalizer.std:.3f}"]
        for member in getattr(scorer, "members", [scorer])
    ]
    shown = [[n, *(number(m[key]) for key in ("value", "low", "high")), f"{m['n']:,}"] for n, m in metrics.items()]
    parts = [
        html.verdict(f"{len(config.members)} reward models, rule {config.rule}."),
        html.links([("report card", "reward_report.html")] if config.eval_data else []),
        html.table((["reward model", "mean of its raw scores", "their spread"], rows)),
        html.note(f"Raw scores are of responses of {config.data}; each model's are shifted and scaled by its own."),
        html.table((["measure", "value", "low", "high", "n"], shown)) if shown else "",
    ]
    html.write(folder / "ensemble.html", html.page(f"Ensemble {folder.name}", "\n".join(filter(None, parts))))


def main(argv: list[str]) -> None:
    config = configs.load(EnsembleConfig, argv, section="ensemble", known_sections=SECTIONS, description=__doc__ or "")
    ensemble(config)


if __name__ == "__main__":
    configs.run(main)
