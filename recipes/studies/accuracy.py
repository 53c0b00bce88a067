"""Study 1: a reward model's accuracy grows with its data and with its size.

python recipes/studies/accuracy.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rlhf import config as configs
from rlhf.rows.records import read_rankings, write_jsonl
from rlhf.run.stages import Manifest
from rlhf_recipes.chain import FunctionConfig, make_base
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.sft import SFTRecipe, sft
from rlhf_recipes.studies.shared_runs import chain, stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, main

DATA, SIZE = "data", "model size"


@dataclass(frozen=True, kw_only=True)
class AccuracyConfig(StudyConfig):
    """Settings of the study."""

    prompts: list[int] = field(default_factory=lambda: [100, 300, 1000])
    """Training prompts of the smaller reward models; the chain's own has all."""
    hidden: list[int] = field(default_factory=lambda: [32, 64])
    """Hidden sizes of the smaller base models; the chain's own is the largest."""


def run(config: AccuracyConfig) -> Iterator[Row]:
    folder = chain(config, "reward_model")
    whole = Manifest.read(folder / "reward_model").outputs
    rankings = read_rankings(folder / "rankings/train.jsonl")
    for size in config.prompts:
        data = folder / f"train_{size}.jsonl"
        write_jsonl(data, rankings[:size])
        out = stage(config, reward_model, RewardRecipe, "reward_model", f"reward_model_{size}", train_data=str(data))
        yield row(DATA, size, Manifest.read(out).outputs)
    yield row(DATA, float(f"{len(rankings):.2g}"), whole)  # the same of all seeds, which differ by a few prompts
    for hidden in config.hidden:
        shape = {"hidden_size": hidden, "layers": 2 if hidden < 64 else 3, "heads": 2, "learning_rate": 2.5e-3}
        base = stage(config, make_base, FunctionConfig, "base", f"base_{hidden}", options=shape)
        tuned = stage(config, sft, SFTRecipe, "sft", f"sft_{hidden}", model=str(base))
        out = stage(
            config, reward_model, RewardRecipe, "reward_model", f"reward_model_h{hidden}", model=str(tuned),
            train_data=str(folder / "rankings/train.jsonl"),
        )  # fmt: skip
        yield row(SIZE, Manifest.read(base).outputs["parameters"], Manifest.read(out).outputs)
    yield row(SIZE, Manifest.read(folder / "base").outputs["parameters"], whole)


def row(panel: str, x: float, outputs: Mapping[str, Any]) -> Row:
    """Return the accuracy on held-out labels that a reward model's stage measured."""
    low, high = outputs["accuracy_ci"]
    return Row("held-out labels", outputs["accuracy"], float(x), low, high, outputs["prompts"], panel)


def growth(panel: str, rows: list[Row]) -> float:
    """Return how much more accurate the largest is than the smallest."""
    found = sorted((r.x or 0.0, r.value) for r in rows if r.panel == panel)
    return found[-1][1] - found[0][1]


STUDY = Study(
    name="accuracy",
    number=1,
    title="Accuracy grows with data and model size",
    claim="Doubling the training data adds about 1.1 points of held-out accuracy, doubling the model about 1.8.",
    source="Stiennon et al. 2020, section 4.3",
    miniature="Toy labelers rank four answers per prompt; reward models of 100 to 3,200 prompts, and of three sizes.",
    panels=[
        Panel(DATA, "training prompts", "accuracy on held-out labels", "log"),
        Panel(SIZE, "parameters", "accuracy on held-out labels", "log"),
    ],
    checks=[
        Check("the most data are more accurate than the least", partial(growth, DATA)),
        Check("the largest model is more accurate than the smallest", partial(growth, SIZE)),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, AccuracyConfig, __file__, argv))
