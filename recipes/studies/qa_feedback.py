"""Study 20: a reward model of answers to questions about long passages, four ranked answers each.

    python recipes/studies/qa_feedback.py --source dev_feedback.json

The file is in github.com/allenai/FineGrainedRLHF, tasks/qa_feedback/data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.rows.sources import require_there
from rlhf.run.stages import Manifest
from rlhf_recipes.rankings import DataConfig, rankings
from rlhf_recipes.reward_model import RewardRecipe, reward_model
from rlhf_recipes.sft import SFTRecipe, sft
from rlhf_recipes.studies.shared_runs import stage
from rlhf_recipes.studies.study import Check, Panel, Row, Study, StudyConfig, at, main

MODEL = "reward model"
BASELINES = {"bag of words": "bag_of_words_accuracy", "better length rule": "length_baseline"}


@dataclass(frozen=True, kw_only=True)
class QAConfig(StudyConfig):
    """Settings of the study."""

    source: str = ""
    """The published dev_feedback.json, or its rows as JSONL (.gz)."""
    model: str | None = None
    """What is fine-tuned; null: the chain's."""

    @property
    def files(self) -> dict[str, str]:
        return {**super().files, "source": self.source}

    def check(self) -> None:
        if not self.source:
            raise InputError("--source is missing: dev_feedback.json of github.com/allenai/FineGrainedRLHF")
        require_there(Path(self.source))


def run(config: QAConfig) -> Iterator[Row]:
    configs.import_function("data/qa_feedback/qa_feedback.py:make")(
        config.shared / "data", seed=config.seed, source=config.source
    )
    stage(config, sft, SFTRecipe, "sft", "sft", **({"model": config.model} if config.model else {}))
    stage(config, rankings, DataConfig, "data", "rankings")
    trained = stage(config, reward_model, RewardRecipe, "reward_model", "reward_model", seeds=None, keep_seeds=False)
    own = Manifest.read(trained).outputs
    yield Row(MODEL, own["accuracy"], None, *own["accuracy_ci"], own["n"])
    for name, key in BASELINES.items():
        yield Row(name, own[key], None, *own[f"{key}_ci"], own["n"])


def above(other: str, rows: Sequence[Row]) -> float:
    return at(rows, MODEL) - at(rows, other)


STUDY = Study(
    name="qa_feedback",
    number=20,
    title="Which answer about a passage people prefer",
    claim="Overall preferences for answers to information-seeking questions can be learned from rankings of four.",
    source="Wu et al. 2306.01693 (Fine-Grained RLHF), section 4",
    miniature="400 questions with their passages, a quarter held out, another for each seed; SmolLM2-135M with LoRA "
    "after SFT on corrected answers.",
    panels=[Panel(y="right on held-out pairs")],
    checks=[
        Check("above chance", lambda rows: at(rows, MODEL) - 0.5),
        *(Check(f"above the {name}", partial(above, name)) for name in BASELINES),
    ],
    run=run,
)

if __name__ == "__main__":
    configs.run(lambda argv: main(STUDY, QAConfig, __file__, argv))
