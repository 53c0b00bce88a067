"""PPO of a policy against a reward model and functions.

    rlhf ppo --model runs/my/sft --reward_model runs/my/reward_model \\
        --train_data prompts.jsonl --output_dir runs/my/ppo
    rlhf ppo --config toy.yaml    # its `ppo:` section, the run's inputs
    rlhf ppo --num_processes 8 --accelerate_config ddp.yaml --config my.yaml
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf import config as configs
from rlhf.errors import InputError
from rlhf.ppo.config import PPOConfig
from rlhf.rows.mixed import Sources
from rlhf.rows.records import read_prompts
from rlhf.run import console
from rlhf.run.checkpoint import full_disk_explained
from rlhf.run.precision import compute_dtype
from rlhf.run.settings import require_needed
from rlhf.run.stages import POLICIES
from rlhf.urls import is_url
from rlhf_recipes.stage import (
    SCORERS,
    SECTIONS,
    check_kept,
    check_model,
    from_siblings,
    next_command,
    open_stage,
    with_columns,
)

console.quiet()


@dataclass(frozen=True, kw_only=True)
class PPORecipe(PPOConfig):
    """PPO of a policy against scores."""

    MOST_USED = (
        "model", "reward_model", "reward_functions", "train_data", "output_dir", "updates", "rollout_size",
        "learning_rate", "kl_coef", "max_new_tokens",
    )  # fmt: skip

    "Model and data"

    model: str | None = None
    """Policy to start from, and the reference; default: the run's `sft`."""
    reward_model: str | None = None
    """Trained reward model, which the value model starts from too, or an ensemble's folder (then from its first
    member); default: the run's `reward_model`. none: not even that, where something else scores."""
    process_model: str | None = None
    """Process or outcome reward model, whose solution score is one more score; step_score_coef adds its step scores.
    Default: the run's `process_reward`, if there is one; none: not even that."""
    reward_functions: list[str] | None = None
    """Further scores, as path/to/file.py:function or package.module:function (of reward_models.rules, too).
    reward_weights weighs all scores in this order: reward model, process model, functions, grader."""
    grader: str | None = None
    """Causal language model that grades responses by a rubric: a folder or hub id; or a function (file.py:name) from
    the question to a letter."""
    rubric: str | None = None
    """The grader's multiple-choice question: a YAML file with instructions, and choices with their scores; or a usage
    policy's, which gives one."""
    train_data: Sources | None = None
    """Prompts; default: the run's rankings/prompts.jsonl."""
    eval_data: Sources | None = None
    """Held-out prompts, for eval_steps."""
    columns: dict[str, str] | None = None
    """Our names of columns and what the files named here call them, as {prompt: question}; null: the same."""
    max_prompts: int | None = None
    """Use only the first so many prompts."""

    "Sampling by vLLM"

    vllm_server: str | None = None
    """Address of a vLLM server (http://host:port) that samples the responses; null: the built-in loop."""
    vllm_transport: Literal["lora", "folder", "nccl"] | None = None
    """How it gets the weights: lora: the adapter, over the base that it serves; folder: all weights; nccl: all, from
    GPU to GPU (needs vllm here, too); null: lora if vLLM can load the policy's adapter, else folder."""
    vllm_folder: str | None = None
    """Folder through which the weights pass, which the server sees under the same path; null: a temporary one."""
    vllm_wait_seconds: float = 300.0
    """Time for a server that died to come back, after which the run stops."""
    vllm_colocated: bool = False
    """The server shares the trainer's GPU and sleeps while it trains (vllm serve --enable-sleep-mode); not yet run."""
    vllm_tolerance_nats: float | None = None
    """Largest mean difference of the server's log-probabilities of one text and the trainer's, compared each time it
    was sent the weights; null: 0.001 in float32, 0.1 in bfloat16."""

    "Run"

    keep_checkpoint: bool = False
    """Keep the last checkpoint once the stage is complete, to train it longer later; needs save_steps."""
    overwrite: bool = False
    """Replace another run's output in output_dir."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kept(self)
        served = ("transport", "folder", "wait_seconds", "colocated", "tolerance_nats")
        require_needed(self, "vllm_server", *(f"vllm_{name}" for name in served))
        if (self.grader is None) != (self.rubric is None):
            given, missing = ("grader", "rubric") if self.grader else ("rubric", "grader")
            raise InputError(f"--{given} needs --{missing}: a grader model answers a rubric")
        if self.vllm_wait_seconds < 0 or (self.vllm_tolerance_nats or 1.0) <= 0:
            raise InputError(
                f"vllm_wait_seconds={self.vllm_wait_seconds} must be 0 or more, and "
                f"vllm_tolerance_nats={self.vllm_tolerance_nats} above 0 or null"
            )


def ppo(config: PPORecipe) -> dict[str, Any]:
    """The stage: PPO from the SFT model against the reward model; the last update's metrics."""
    config, sources = inputs(config)
    stage = open_stage("ppo", config, sources)
    if stage.complete:
        return stage.outputs
    from rlhf.ppo.trainer import PPOTrainer

    functions = score_functions(config)
    trainer = PPOTrainer(
        str(config.model),
        functions,
        args=config,
        train_dataset=read_prompts(config.train_data, on_bad_row=config.on_bad_row)[: config.max_prompts],
        eval_dataset=config.eval_data,
        value_model=value_start(config, functions),
        engine=vllm_engine(config),
    )
    stage.begin()
    metrics = trainer.train(resume_from_checkpoint=stage.resuming)
    with full_disk_explained(stage.folder):
        trainer.save_model(stage.folder)
    shown = ("score", "kl_nats", "entropy_nats", "explained_variance", "response_tokens", "eos_rate", "kl_coef")
    outputs = {name: metrics[name] for name in shown if name in metrics} | {"updates": trainer.update_index}
    if "alignment_tax_nats" in metrics:
        after, tax = metrics["eval_pretraining_loss"], metrics["alignment_tax_nats"]
        outputs |= {"pretraining_loss_before": after - tax, "pretraining_loss_after": after, "alignment_tax_nats": tax}
    return stage.finish(outputs, trainer.processing_class, str(config.model))


def inputs(config: PPORecipe) -> tuple[PPORecipe, dict[str, Any]]:
    """The config, with what it takes from the run's other stages; the models and data that the stage reads."""
    config = from_siblings(with_columns(config, "train_data", "eval_data"), process_model="?process_reward")
    optional = "?" if config.process_model or config.reward_functions or config.grader else ""
    config = from_siblings(
        config, model="sft", reward_model=f"{optional}reward_model", train_data="rankings/prompts.jsonl"
    )
    check_model(str(config.model), POLICIES)
    if config.reward_model:
        check_model(config.reward_model, SCORERS)
    if config.process_model:
        check_model(config.process_model, ("process_reward",))
    names = (
        "model", "reward_model", "process_model", "train_data", "eval_data", "grader", "rubric", "pretraining_data",
    )  # fmt: skip
    return config, {name: getattr(config, name) for name in names}


def value_start(config: PPORecipe, functions: list[Any]) -> str | None:
    """What the value model starts from: the reward model; None where the trainer finds it (an ensemble's first member),
    or where it starts from nothing."""
    found = config.value_model == "shared_trunk" or (functions and hasattr(functions[0], "members"))
    return None if found else config.reward_model


def vllm_engine(config: PPORecipe) -> Any:
    if config.vllm_server is None:
        return None
    from rlhf.sampling.vllm import VLLMEngine

    return VLLMEngine(
        config.vllm_server,
        config.vllm_transport,
        config.vllm_folder,
        wait_seconds=config.vllm_wait_seconds,
        tolerance_nats=config.vllm_tolerance_nats,
        colocated=config.vllm_colocated,
    )


def score_functions(config: PPORecipe) -> list[Any]:
    """Everything that scores a response, in the order of reward_weights."""
    from reward_models import ProcessModel, RewardClient
    from reward_models.ensemble import load_scorer
    from reward_models.grader import RubricGrader
    from reward_models.judges import is_function
    from rlhf.safety.policy import read_rubric

    dtype = compute_dtype(config.bf16)
    functions: list[Any] = [] if config.reward_model is None else [load_scorer(config.reward_model, dtype=dtype)]
    functions += [] if config.process_model is None else [ProcessModel.load(config.process_model, dtype=dtype)]
    functions += [
        RewardClient(spec) if is_url(spec) else configs.import_function(spec) for spec in config.reward_functions or []
    ]
    if config.grader is not None:
        asked = configs.import_function(config.grader) if is_function(config.grader) else config.grader
        functions.append(RubricGrader.load(asked, read_rubric(str(config.rubric)), dtype=dtype))
    return functions


def main(argv: list[str]) -> None:
    config = configs.load(PPORecipe, argv, section="ppo", known_sections=SECTIONS, description=__doc__ or "")
    ppo(config)
    next_command(
        "evaluate_policy", argv, config.output_dir, "evaluation", judge="judge", eval_data="data/eval_prompts.jsonl"
    )


if __name__ == "__main__":
    configs.run(main)
